"""Group advantages and the filters."""

import itertools

import pytest
import torch

from speedrl.method.advantages import count_residuals, group_advantages, leave_one_out
from speedrl.method.filters import dropped_groups, low_quality, std_percentile

REWARDS = torch.tensor([[0.1, 0.5, 0.3, 0.9], [2.0, 2.5, 1.0, 0.0], [0.3, 0.3, 0.3, 0.3]])


@pytest.mark.parametrize("std", ["group", "batch", "none"])
def test_advantages_sum_to_zero_and_ignore_a_shift(std):
    advantages = group_advantages(REWARDS, std=std)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(group_advantages(REWARDS + 100, std=std), advantages, atol=5e-4, rtol=0)
    assert torch.equal(advantages[0].argsort(), REWARDS[0].argsort())


def test_each_scale_by_hand():
    rewards = torch.tensor([[1.0, 3.0], [0.0, 8.0]])  # deviations 1 and 4 from the means 2 and 4
    assert group_advantages(rewards, std="none").tolist() == [[-1, 1], [-4, 4]]
    torch.testing.assert_close(group_advantages(rewards, eps=0.0), torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]))
    whole = ((1 + 1 + 16 + 16) / 4) ** 0.5
    torch.testing.assert_close(
        group_advantages(rewards, std="batch", eps=0.0), torch.tensor([[-1.0, 1.0], [-4.0, 4.0]]) / whole
    )
    torch.testing.assert_close(group_advantages(rewards, eps=1.0), torch.tensor([[-0.5, 0.5], [-0.8, 0.8]]))
    with pytest.raises(ValueError, match="'prompt'"):
        group_advantages(rewards, std="prompt")


def test_scaled_advantages_ignore_the_scale_of_the_reward():
    advantages = group_advantages(REWARDS[:2], eps=0.0)
    torch.testing.assert_close(advantages.std(1, correction=0), torch.ones(2))
    torch.testing.assert_close(group_advantages(REWARDS[:2] * 7, eps=0.0), advantages)


@pytest.mark.parametrize("std", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e6])
def test_equal_rewards_give_exactly_zero(value, std):
    for n in (1, 3, 7):
        assert torch.equal(group_advantages(torch.full((2, n), value), std=std, eps=1e-8), torch.zeros(2, n))


@pytest.mark.parametrize("std", ["group", "batch", "none"])
def test_samples_left_out_count_for_nothing(std):
    keep = torch.tensor([[True, True, False, True], [False, True, True, True], [False, False, False, False]])
    found = group_advantages(REWARDS, std=std, keep=keep)
    other = torch.where(keep, REWARDS, 1e3)  # whatever their rewards
    torch.testing.assert_close(group_advantages(other, std=std, keep=keep), found, atol=1e-3, rtol=1e-3)
    assert not found[~keep].any() and found.isfinite().all()
    if std != "batch":
        alone = group_advantages(REWARDS[:1, [0, 1, 3]], std=std)
        torch.testing.assert_close(found[0, [0, 1, 3]], alone[0])


def test_leave_one_out_subtracts_the_mean_of_the_others():
    found = leave_one_out(torch.tensor([[1.0, 2.0, 6.0]]))
    assert found[0].tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out(torch.ones(3, 1))


QUALITY = torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.9, 0.4], [0.7, 0.6, 0.0]])
COUNTS = torch.tensor([[1, 4, 4], [1, 4, 8], [4, 1, 1]])


def test_residuals_compare_with_the_prompts_other_samples_of_the_same_count():
    residuals, known = count_residuals(QUALITY, COUNTS)
    by_hand = torch.tensor([[0.0, 0.2, -0.2], [0.0, 0.0, 0.0], [0.0, 0.6, -0.6]])
    torch.testing.assert_close(residuals, by_hand * (1 / 2) ** 0.5)
    assert known.tolist() == [[False, True, True], [False] * 3, [False, True, True]]
    residuals, _ = count_residuals(torch.tensor([[0.1, 0.2, 0.6, 0.5]]), torch.tensor([[2, 2, 2, 4]]))
    by_hand = torch.tensor([[0.1 - 0.4, 0.2 - 0.35, 0.6 - 0.15, 0.0]])
    torch.testing.assert_close(residuals, by_hand * (2 / 3) ** 0.5)


def test_residuals_compare_within_the_prompt_at_equal_counts_too():
    """A hard prompt's images are not worse than an easy one's: whatever the mix of counts, the prompt's own compare."""
    quality = torch.tensor([[0.1, 0.3], [0.7, 0.9]])
    for counts in ([[4, 4], [4, 4]], [[4, 4], [8, 8]]):
        residuals, known = count_residuals(quality, torch.tensor(counts))
        torch.testing.assert_close(residuals, torch.tensor([[-0.2, 0.2]] * 2) * 0.5**0.5)
        assert known.all() and low_quality(residuals, threshold=-1.5).all(), "no image of the hard prompt is left out"


def test_residuals_vary_as_the_quality_does_whatever_the_number_that_compares():
    random = torch.Generator().manual_seed(0)
    for m in (2, 3, 8):
        residuals, _ = count_residuals(torch.randn(4000, m, generator=random), torch.full((4000, m), 4))
        assert residuals.var().item() == pytest.approx(1, abs=0.08), m


@pytest.mark.parametrize("std", ["group", "batch", "none"])
def test_the_advantages_of_what_the_filters_keep_sum_to_zero_in_each_group_and_count(std):
    """As the loop computes them: first what is kept, then the residuals and the advantages of that alone."""
    random = torch.Generator().manual_seed(0)
    quality = torch.randn(8, 16, generator=random)
    quality[:, :3] -= 3  # some images that failed
    counts = torch.tensor([1, 2, 4, 8])[torch.randint(4, (8, 16), generator=random)]
    residuals, known = count_residuals(quality, counts)
    keep = known * std_percentile(residuals, percentile=25, keep=known) * low_quality(residuals, threshold=-1.0)
    assert 0 < keep.sum() < known.sum()
    left, counted = count_residuals(quality, counts, keep=keep)
    advantages = group_advantages(left, std=std, keep=counted)
    assert not (counted & ~keep.bool()).any() and not advantages[~counted].any()
    for count in (1, 2, 4, 8):
        sums = (advantages * (counts == count)).sum(1)
        torch.testing.assert_close(sums, torch.zeros(8), atol=1e-5, rtol=0)
    assert group_advantages(residuals, std=std, keep=known)[keep.bool()].mean() > 0.02, "without that they do not"


def test_a_count_of_one_sample_gives_no_advantage():
    residuals, known = count_residuals(QUALITY, COUNTS)
    advantages = group_advantages(residuals, keep=known)
    assert ((advantages != 0) == known).all()


def test_what_makes_a_prompt_easier_in_few_steps_alone_gives_no_advantage():
    """Two prompts, of which one is easy in 1 step: of equal images of a count, none is better than the others."""
    counts, each = torch.tensor([[1, 1, 1, 1, 8, 8, 8, 8]] * 2), torch.tensor([0.0, 0.1, 0.0, 0.1])
    quality = torch.cat([torch.stack([each + 0.9, each + 0.1]), torch.stack([each + 1, each + 1])], 1)
    advantages = group_advantages(*count_residuals(quality, counts)[:1])
    assert (advantages.view(2, 4, 2)[..., 0] < 0).all() and (advantages.view(2, 4, 2)[..., 1] > 0).all()


@pytest.mark.parametrize("std", ["group", "batch", "none"])
def test_a_single_count_gives_the_advantages_of_the_quality(std):
    scale = 1.5**0.5 if std == "none" else 1.0  # of the variance that centring among 3 takes away
    for groups in (1, 3):
        residuals, known = count_residuals(QUALITY[:groups], torch.full((groups, 3), 4))
        assert known.all()
        found = group_advantages(residuals, std=std, keep=known)
        torch.testing.assert_close(found, scale * group_advantages(QUALITY[:groups], std=std), atol=1e-4, rtol=1e-3)


def test_the_baseline_of_a_sample_does_not_depend_on_it():
    before, known = count_residuals(QUALITY, COUNTS)
    for place in known.nonzero().tolist():
        changed = QUALITY.clone()
        changed[tuple(place)] += 5
        after, _ = count_residuals(changed, COUNTS)
        assert (after - before)[tuple(place)].item() == pytest.approx(5 * (1 / 2) ** 0.5)


@pytest.mark.parametrize("counts", [[[0, 0], [1, 1]], [[0, 0], [1, 0]]])
def test_residuals_leave_the_expected_gradient_of_the_tokens_unchanged(counts):
    """Two prompts of two samples with counts 1 and 2, each a token of two: every outcome by enumeration."""
    logits = torch.tensor([[0.3, -0.2], [0.9, -0.5]], requires_grad=True)  # of each count
    counts = torch.tensor(counts)
    log_p, worth = logits.log_softmax(-1), torch.tensor([[0.1, 0.7], [0.5, 0.6]])  # worth of count and token

    def expected(subtract: bool) -> torch.Tensor:
        total = torch.zeros(())
        for outcome in itertools.product(range(2), repeat=4):
            tokens = torch.tensor(outcome).view(2, 2)
            score, quality = log_p[counts, tokens], worth[counts, tokens]
            residuals, known = count_residuals(quality, counts + 1)
            weight = residuals if subtract else quality * known * (1 / 2) ** 0.5  # the factor of pairs
            total = total + score.sum().exp().detach() * (weight * score).sum()
        return torch.autograd.grad(total, logits, retain_graph=True)[0]

    torch.testing.assert_close(expected(True), expected(False), atol=1e-6, rtol=1e-5)
    assert expected(False).abs().max() > 0.02


def test_percentile_keeps_the_groups_that_differ_most():
    spread = torch.tensor([[0.0, 4.0], [0.0, 1.0], [0.0, 3.0], [0.0, 2.0], [5.0, 5.0]])
    kept = {p: std_percentile(spread, percentile=p)[:, 0].tolist() for p in (0, 25, 50, 60, 100)}
    assert kept[0] == [1, 1, 1, 1, 1]
    assert kept[25] == [1, 1, 1, 1, 0]
    assert kept[50] == [1, 0, 1, 1, 0]
    assert kept[60] == [1, 0, 1, 0, 0]
    assert kept[100] == [1, 0, 0, 0, 0]
    weights = std_percentile(spread, percentile=50)
    assert weights.shape == (5, 2) and weights.dtype == torch.float32 and torch.equal(weights[:, 0], weights[:, 1])


@pytest.mark.parametrize(
    ("groups", "percentile", "dropped"),
    [(8, 10, 1), (8, 5, 0), (8, 12.5, 1), (8, 20, 2), (2, 10, 0), (2, 50, 1), (4, 80, 3), (16, 10, 2)],
)
def test_a_percentile_drops_its_share_of_the_groups_rounded_to_whole_ones(groups, percentile, dropped):
    spread = torch.arange(2 * groups).view(groups, 2).float() ** 2  # each differs more than the one before it
    kept = std_percentile(spread, percentile=percentile)[:, 0]
    assert kept.tolist() == [0] * dropped + [1] * (groups - dropped) and dropped_groups(groups, percentile) == dropped


def test_percentile_keeps_all_groups_that_tie():
    assert std_percentile(torch.tensor([[0.0, 1.0]] * 4), percentile=90).sum() == 8
    assert std_percentile(torch.tensor([[0.3, 0.3]]), percentile=100).sum() == 2


@pytest.mark.parametrize("percentile", [-1, 100.5, float("nan")])
def test_percentile_out_of_range_is_named(percentile):
    with pytest.raises(ValueError, match="0 to 100"):
        std_percentile(REWARDS, percentile=percentile)


def test_percentile_leaves_samples_out_of_the_deviations():
    quality = torch.tensor([[0.0, 0.0, 9.0], [0.0, 1.0, 0.5], [0.0, 2.0, 1.0]])
    keep = torch.tensor([[True, True, False], [True, True, True], [True, True, True]])
    assert std_percentile(quality, percentile=100)[:, 0].tolist() == [1, 0, 0]
    assert std_percentile(quality, percentile=100, keep=keep)[:, 0].tolist() == [0, 0, 1]
    assert std_percentile(quality, percentile=33, keep=keep)[:, 0].tolist() == [0, 1, 1]
    assert std_percentile(quality, percentile=50, keep=torch.zeros(3, 3)).isfinite().all()


def test_low_quality_samples_lose_their_weight_by_standard_deviations():
    quality = torch.tensor([[0.0, 2.0], [2.0, 4.0]])  # mean 2, standard deviation sqrt(2)
    assert low_quality(quality, threshold=-1.0).tolist() == [[0, 1], [1, 1]]
    assert low_quality(quality, threshold=-1.5).tolist() == [[1, 1], [1, 1]]
    assert low_quality(quality, threshold=0.5).tolist() == [[0, 0], [0, 1]]
    assert low_quality(REWARDS, threshold=-torch.inf).sum() == 12
    other_units = low_quality(100 * quality - 7, threshold=-1.0)
    assert torch.equal(other_units, low_quality(quality, threshold=-1.0))
