"""Mask schedules against the published counts, and their invariants."""

from fractions import Fraction

import pytest
import torch

from speedrl.method.schedules import halton_order, mask_ratio, masked_counts, radical_inverse, temperatures, timesteps

KINDS = ["cosine", "linear", "square", "arccos"]


def revealed(steps: list[int], length: int, kind: str = "cosine") -> torch.Tensor:
    masked = masked_counts(torch.tensor(steps), length=length, kind=kind)
    return -torch.diff(masked, dim=1, prepend=torch.full((len(steps), 1), length))


def test_reveals_per_step_of_the_reference_sampler():
    counts = revealed([4, 8], 4096)
    assert counts[0].tolist() == [312, 888, 1329, 1567, 0, 0, 0, 0]
    assert counts[1].tolist() == [79, 233, 379, 509, 621, 708, 768, 799]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 3, 16, 256])
def test_counts_follow_the_recurrence(kind, length):
    steps = list(range(1, 21))
    counts = masked_counts(torch.tensor(steps), length=length, kind=kind)
    for row, n in zip(counts.tolist(), steps, strict=True):
        previous = length
        for s in range(20):
            ratio = mask_ratio(torch.tensor(min(s + 1, n)) / n, kind=kind)
            expected = max(1, min(previous - 1, int(length * ratio))) if s < n - 1 else 0
            assert row[s] == expected
            previous = expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_reveals_and_all_steps_reveal_everything(kind):
    steps = [1, 2, 3, 5, 16]
    counts = revealed(steps, 16, kind)
    assert counts.sum(1).tolist() == [16] * 5
    for row, n in zip(counts, steps, strict=True):
        assert (row[:n] > 0).all() and (row[n:] == 0).all()


def test_whole_numbers_are_rounded_as_the_published_schedulers_round_them():
    # in float32 1 - 3 / 5 is under 0.4, and cos(pi / 3) under a half
    assert masked_counts(torch.tensor([5]), length=10, kind="linear").tolist() == [[8, 6, 3, 1, 0]]
    assert masked_counts(torch.tensor([3]), length=16).tolist() == [[13, 7, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_ratio_falls_from_one_to_zero(kind):
    ratio = mask_ratio(torch.linspace(0, 1, 101, dtype=torch.float64), kind=kind)
    assert ratio[0] == pytest.approx(1) and ratio[-1] == pytest.approx(0, abs=1e-12)
    assert (ratio.diff() < 0).all()


def test_timestep_counts_down_to_zero_and_stays():
    assert timesteps(torch.tensor([1, 2, 4])).tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [3, 2, 1, 0]]


def test_temperature_is_a_linspace_per_sample():
    rows = temperatures(torch.tensor([1, 2, 5]), start=2.0)
    assert rows.dtype == torch.float32
    assert rows[0].tolist() == [2, 0, 0, 0, 0] and rows[1].tolist() == [2, 0, 0, 0, 0]
    torch.testing.assert_close(rows[2], torch.linspace(2, 0, 5))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="at least 1"):
        masked_counts(torch.tensor([4, 0]), length=16)
    with pytest.raises(ValueError, match="'cubic'"):
        masked_counts(torch.tensor([4]), length=16, kind="cubic")


@pytest.mark.parametrize(("base", "cells"), [(2, 16), (3, 16), (3, 9), (5, 7)])
def test_radical_inverse_by_digits(base, cells):
    for index, found in enumerate(radical_inverse(torch.arange(200), base=base, cells=cells).tolist()):
        digits, left = [], index
        while left:
            digits.append(left % base)
            left //= base
        point = sum(Fraction(digit, base ** (place + 1)) for place, digit in enumerate(digits))
        assert found == int(point * cells)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 4), (16, 16), (8, 32), (9, 27), (64, 64)])
def test_halton_order_visits_cells_as_scipys_sequence_does(rows, columns):
    from scipy.stats import qmc

    points = qmc.Halton(d=2, scramble=False).random(60 * rows * columns)[1:]
    cells = [(int(x * rows + 1e-9), int(y * columns + 1e-9)) for x, y in points]  # 1/3 of 9 is 3, not 2.9999
    visited = list(dict.fromkeys(cells))[: rows * columns]
    turns = halton_order(rows, columns)
    assert sorted(turns.tolist()) == list(range(rows * columns))
    assert [divmod(place, columns) for place in turns.argsort().tolist()] == visited


def test_the_first_of_the_halton_order_are_spread_over_the_whole_grid():
    first = (halton_order(16, 16) < 36).view(16, 16)
    quarters = first.unflatten(0, (4, 4)).unflatten(2, (4, 4)).sum((1, 3))
    assert quarters.min() >= 1 and quarters.max() <= 4
    with pytest.raises(ValueError, match="at least one row"):
        halton_order(0, 4)
