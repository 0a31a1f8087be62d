"""Mask schedules, reveal orders and timesteps for samples that each have their own step count."""

import functools
import hashlib
import math

import torch
from torch import Tensor


def mask_ratio(progress: Tensor, *, kind: str = "cosine") -> Tensor:
    """Share of the tokens still masked after `progress` in [0, 1] of the steps: 1 at 0, falling to 0 at 1.

    Any shape, floating dtype; the result has both. Kinds, for progress p: "cosine" cos(pi/2 p), "linear" 1 - p,
    "square" 1 - p^2, "arccos" 2/pi arccos(p) (MaskGIT, arXiv 2202.04200, section 3.3), and "power:X" 1 - p^X.
    ValueError for another kind.
    """
    if kind.startswith("power:"):
        return 1 - progress ** exponent(kind)
    match kind:
        case "cosine":
            return torch.cos(progress * math.pi / 2)
        case "linear":
            return 1 - progress
        case "square":
            return 1 - progress**2
        case "arccos":
            return torch.acos(progress) * (2 / math.pi)
    raise ValueError(f"`schedule` must be cosine, linear, square, arccos or power:X, got {kind!r}")


def exponent(kind: str) -> float:
    """The X of a mask schedule "power:X". ValueError where it is no positive number."""
    try:
        value = float(kind.removeprefix("power:"))
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ValueError(f"`schedule` power:X takes a positive number, like power:2.5, got {kind!r}")
    return value


def masked_counts(steps: Tensor, *, length: int, kind: str = "cosine", power: Tensor | None = None) -> Tensor:
    """Tokens still masked after each step: steps int64 [B] -> int64 [B, S] with S = steps.max().

    For a sample of N steps over L tokens, step s leaves max(1, min(previous - 1, floor(L ratio((s + 1) / N)))), the
    last step leaves 0, and so does every step after it. `power` float32 [B] is an exponent on the progress. The rule is
    that of Meissonic's and aMUSEd's schedulers, in float32 as theirs, which decides what floor makes of a whole number.
    A sample with more steps than tokens reveals nothing in some steps. ValueError for a step count or length below 1.
    """
    n = steps.cpu()  # one synchronisation for a whole rollout
    if n.numel() == 0 or n.min() < 1 or length < 1:
        raise ValueError(f"step counts and length must be at least 1, got steps {n.tolist()} and length {length}")
    s = torch.arange(int(n.max()))
    progress = ((s + 1) / n[:, None]).clamp(max=1)
    if power is not None:
        progress = progress ** power.cpu()[:, None]
    wanted = (length * mask_ratio(progress, kind=kind)).floor().long()
    # m_s = min(m_{s-1} - 1, wanted_s) is a running minimum of m_s + s, started at m_0 <= L - 1
    masked = (wanted + s).clamp(max=length - 1).cummin(dim=1).values - s
    return torch.where(s < n[:, None] - 1, masked.clamp(min=1), 0).to(steps.device)


def timesteps(steps: Tensor) -> Tensor:
    """Countdown N - 1 - s that conditions the network at step s, 0 once done: steps int64 [B] -> int64 [B, S].

    Meissonic feeds this countdown, so the step count is part of the conditioning and must be replayed with the state.
    """
    s = torch.arange(int(steps.max()), device=steps.device)
    return (steps[:, None] - 1 - s).clamp(min=0)


def temperatures(steps: Tensor, *, start: float = 2.0) -> Tensor:
    """Temperature of the confidence noise, linspace(start, 0, N) for each sample: steps int64 [B] -> float32 [B, S].

    0 once a sample is done. N = 1 gives [start], which is of no effect: the last step reveals everything.
    """
    s = torch.arange(int(steps.max()), device=steps.device)
    return start * (1 - s / (steps[:, None] - 1).clamp(min=1)).clamp(min=0)


@functools.cache
def halton_order(rows: int, columns: int) -> Tensor:
    """The turn of each position of a grid of tokens in its Halton order: int64 [rows * columns], 0 for the first.

    Positions in the order in which the two-dimensional Halton sequence, base 2 down the rows and base 3 along the
    columns, first falls into them: neighbours in time are far apart in the picture, so that tokens drawn in one step
    depend little on each other (Besnier et al., arXiv 2503.17076). ValueError for a grid without positions.
    """
    if min(rows, columns) < 1:
        raise ValueError(f"a grid needs at least one row and one column, got {rows} and {columns}")
    points, first = rows * columns, torch.zeros(1)
    while first.numel() != rows * columns or first.max() == points:  # until the sequence has been everywhere
        points *= 2
        index = torch.arange(1, points + 1)  # the sequence's point 0 is the corner, and is left out
        cell = radical_inverse(index, base=2, cells=rows) * columns + radical_inverse(index, base=3, cells=columns)
        first = torch.full((rows * columns,), points).scatter_reduce(0, cell, index - 1, "amin")
    return first.argsort().argsort()


def radical_inverse(index: Tensor, *, base: int, cells: int) -> Tensor:
    """Which of `cells` equal parts of [0, 1) van der Corput's sequence hits: index int64 [N] -> int64 [N].

    Point i is its digits mirrored at the point: in base 2, 6 = 110 is 0.011. In whole numbers, so that no rounding
    puts a point into the part beside its own.
    """
    mirrored, scale = torch.zeros_like(index), 1
    while index.any():
        mirrored, scale, index = mirrored * base + index % base, scale * base, index // base
    return mirrored * cells // scale


def seeded(key: str) -> torch.Generator:
    """A generator on the CPU for what `key` names, like "seed,sample"; those of other keys are unrelated to it."""
    # torch's CPU generator keeps only 32 bits of its seed: hash into them, so that neighbours are unrelated
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest()))


def remasking_steps(steps: Tensor, *, share: float, least: int = 6) -> Tensor:
    """How many of each sample's last steps remask: int64 [B] -> int64 [B].

    A quarter of the steps, and two at least; none where the share of tokens is 0, nor of fewer than `least` steps,
    where every step is needed to reveal.
    """
    return torch.where(steps >= least, (steps // 4).clamp(min=2), 0) if share else torch.zeros_like(steps)


def remasked_counts(steps: int, *, length: int, share: float) -> list[int]:
    """How many of `length` tokens each of the remasking steps masks and draws again.

    The first two steps, one on each colour of the checkerboard, take the share of the tokens together. Each pair after
    them takes fewer, in equal parts, so that the last steps, which nothing follows, change little.
    """
    pairs = (steps + 1) // 2
    return [round(length * share / 2 * (pairs - step // 2) / pairs) for step in range(steps)]


def checkerboard(rows: int, columns: int) -> Tensor:
    """The colour, 0 or 1, of each position of a grid: int64 [rows * columns]; neighbours have different colours."""
    return ((torch.arange(rows)[:, None] + torch.arange(columns)) % 2).flatten()
