"""Group advantages and the filters."""

import pytest
import torch

from speedrl.method.advantages import early_advantages, group_advantages
from speedrl.method.filters import low_quality, std_percentile

REWARDS = torch.tensor([[0.1, 0.5, 0.3, 0.9], [2.0, 2.5, 1.0, 0.0], [0.3, 0.3, 0.3, 0.3]])


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_sum_to_zero_and_ignore_a_shift(scale):
    advantages = group_advantages(REWARDS, scale=scale)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(group_advantages(REWARDS + 100, scale=scale), advantages, atol=5e-4, rtol=0)
    assert torch.equal(advantages[0].argsort(), REWARDS[0].argsort())


def test_scaled_advantages_have_unit_variance_whatever_the_scale_of_the_reward():
    advantages = group_advantages(REWARDS[:2], eps=0.0)
    torch.testing.assert_close(advantages.std(1, correction=0), torch.ones(2))
    torch.testing.assert_close(group_advantages(REWARDS[:2] * 7, eps=0.0), advantages)
    torch.testing.assert_close(group_advantages(REWARDS[:1], scale=False)[0], REWARDS[0] - 0.45)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e6])
def test_equal_rewards_give_exactly_zero(value):
    for n in (1, 3, 7):
        assert torch.equal(group_advantages(torch.full((1, n), value), eps=1e-8), torch.zeros(1, n))


def test_early_advantages_are_of_the_steps_that_see_nearly_everything_masked():
    reveal_step = torch.tensor([[0] + [1] * 2 + [2] * 7, [0] * 10, [0] + [1] + [2] * 8])  # 3, 1 and 3 steps
    found = early_advantages(torch.tensor([2.0, -1.0, 0.5]), reveal_step, 3)
    assert found.tolist() == [[2.0, 2.0, 0.0], [-1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]  # 10, 9, 7; 10; 10, 9, 8 of 10 masked
    assert early_advantages(torch.ones(3), reveal_step, 3, masked=0.8)[2].tolist() == [1.0, 1.0, 1.0]


def test_percentile_keeps_the_groups_that_differ_most():
    spread = torch.tensor([[0.0, 4.0], [0.0, 1.0], [0.0, 3.0], [0.0, 2.0], [5.0, 5.0]])
    kept = {p: std_percentile(spread, percentile=p)[:, 0].tolist() for p in (0, 25, 50, 60, 100)}
    assert kept[0] == [1, 1, 1, 1, 1]
    assert kept[25] == [1, 1, 1, 1, 0]
    assert kept[50] == [1, 0, 1, 1, 0]
    assert kept[60] == [1, 0, 1, 0, 0]  # interpolated between 2 / 2 and 3 / 2
    assert kept[100] == [1, 0, 0, 0, 0]
    weights = std_percentile(spread, percentile=50)
    assert weights.shape == (5, 2) and weights.dtype == torch.float32 and torch.equal(weights[:, 0], weights[:, 1])


def test_percentile_keeps_all_groups_that_tie():
    assert std_percentile(torch.tensor([[0.0, 1.0]] * 4), percentile=90).sum() == 8
    assert std_percentile(torch.tensor([[0.3, 0.3]]), percentile=100).sum() == 2


@pytest.mark.parametrize("percentile", [-1, 100.5, float("nan")])
def test_percentile_out_of_range_is_named(percentile):
    with pytest.raises(ValueError, match="0 to 100"):
        std_percentile(REWARDS, percentile=percentile)


def test_low_quality_samples_lose_their_weight():
    assert low_quality(REWARDS, threshold=0.5).tolist() == [[0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert low_quality(REWARDS, threshold=None).sum() == 12
