"""The clipped loss, its normalisation, and the whole of the core on a toy problem."""

import pytest
import torch

from speedrl.method.advantages import group_advantages
from speedrl.method.divergences import kl
from speedrl.method.filters import low_quality, std_percentile
from speedrl.method.likelihoods import log_probs, log_ratio
from speedrl.method.losses import clipped_loss, normalise
from speedrl.method.sampling import draw_noise, rollout, state
from speedrl.method.schedules import timesteps


def test_gradient_at_ratio_one_is_the_policy_gradient():
    """Every token of a small codebook, weighted by its probability: -E[A grad log pi]."""
    logits = torch.randn(6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0])
    log_p = log_probs(logits.expand(6, -1), torch.arange(6))
    p = log_p.exp().detach()
    loss, _ = clipped_loss(log_ratio(log_p[:, None], log_p.detach()[:, None]), advantages, p[:, None])
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (policy_gradient,) = torch.autograd.grad(-(log_p.exp() * advantages).sum(), logits)
    torch.testing.assert_close(found, policy_gradient)
    assert found.abs().max() > 0.1


def test_clipping_zeroes_exactly_the_expected_tokens():
    ratio = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0])
    log_r = ratio.log().expand(2, -1).clone().requires_grad_()
    advantages = torch.tensor([1.5, -1.5])
    loss, stats = clipped_loss(log_r, advantages, torch.ones(2, 7), clip_range=0.2)
    (gradient,) = torch.autograd.grad(loss, log_r)
    assert (gradient[0] == 0).tolist() == [False, False, False, False, False, True, True]
    assert (gradient[1] == 0).tolist() == [True, True, False, False, False, False, False]
    live = gradient != 0
    torch.testing.assert_close(gradient[live], -(ratio * advantages[:, None])[live])
    assert stats["clip_fraction"].item() == pytest.approx(4 / 14)
    by_hand = sum(max(-a * r, -a * min(max(r, 0.8), 1.2)) for a in (1.5, -1.5) for r in ratio.tolist())
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_statistics_are_those_of_the_kept_tokens():
    log_r = torch.tensor([[0.0, 0.1, 500.0], [-0.1, 7.0, torch.inf]], requires_grad=True)
    weights = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    loss, stats = clipped_loss(log_r, torch.tensor([1.0, 1.0]), weights)
    r = torch.tensor([0.0, 0.1, -0.1]).exp()
    assert stats["ratio_mean"].item() == pytest.approx(r.mean().item())
    assert stats["ratio_max"].item() == pytest.approx(r.max().item())
    assert stats["approx_kl"].item() == pytest.approx((r - 1 - r.log()).mean().item(), abs=1e-6)
    assert stats["kept"] == 3 and not any(value.requires_grad for value in stats.values())
    (gradient,) = torch.autograd.grad(loss, log_r)
    assert torch.equal(gradient != 0, weights > 0) and gradient.isfinite().all()


def test_one_ratio_for_each_sample_broadcasts_over_tokens():
    weights = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    per_sample = torch.tensor([[0.1], [-0.1]])
    advantages = torch.tensor([1.0, -2.0])
    narrow, narrow_stats = clipped_loss(per_sample, advantages, weights)
    wide, wide_stats = clipped_loss(per_sample.expand(2, 3), advantages, weights)
    torch.testing.assert_close(narrow, wide)
    for name in narrow_stats:
        torch.testing.assert_close(narrow_stats[name], wide_stats[name])


def test_nothing_kept_gives_no_loss_and_no_gradient():
    log_r = torch.tensor([[0.3, torch.inf]], requires_grad=True)
    total, stats = clipped_loss(log_r, torch.tensor([1.0]), torch.zeros(1, 2))
    loss = normalise(total, stats["kept"])
    (gradient,) = torch.autograd.grad(loss, log_r)
    assert loss == 0 and torch.equal(gradient, torch.zeros(1, 2))
    assert all(value == 0 for value in stats.values())
    assert normalise(torch.tensor(6.0), torch.tensor(4.0)) == 1.5


LENGTH, CODES = 3, 3


def policy(weights: torch.Tensor, tokens: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    features = torch.nn.functional.one_hot(tokens, CODES + 1).flatten(1).float()
    return (features @ weights).view(-1, LENGTH, CODES) * (1 + timestep[:, None, None] / 4)


def objective(weights, result, advantages, sample_weights, *, level="token", beta=0.1, reference=None):
    """Sum over tokens of loss and divergence, scored by replay, and the number of kept tokens."""
    scored = torch.zeros_like(result.log_probs)
    divergence = torch.zeros_like(result.log_probs)
    for s in range(int(result.steps.max())):
        seen, countdown = state(result, s, mask_id=CODES), timesteps(result.steps)[:, s]
        logits = policy(weights, seen, countdown)
        now = result.reveal_step == s
        scored = torch.where(now, log_probs(logits, result.tokens), scored)
        if reference is not None:
            divergence = torch.where(now, kl(logits, policy(reference, seen, countdown), kind="ce"), divergence)
    token_weights = sample_weights[:, None].expand_as(scored)
    total, stats = clipped_loss(log_ratio(scored, result.log_probs, level=level), advantages, token_weights)
    return total + beta * (divergence * token_weights).sum(), stats


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("parts", [[8, 8], [4, 4, 4, 4], [2, 6, 8]])
def test_micro_batches_add_up_to_the_same_gradient_filtered_groups_included(parts, level):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(LENGTH * (CODES + 1), LENGTH * CODES, generator=generator)
    steps = torch.tensor([1, 2, 3, 2] * 4)
    noise = draw_noise(16, 3, LENGTH, seed=0)
    result = rollout(lambda t, n: policy(start, t, n), steps, noise, length=LENGTH, mask_id=CODES)
    quality = torch.rand(4, 4, generator=generator)
    quality[1] = 0.5  # a whole micro-batch without weight
    sample_weights = std_percentile(quality, percentile=40) * low_quality(quality, threshold=0.2)
    assert sample_weights[1].sum() == 0 and 0 < sample_weights.sum() < 16
    advantages, sample_weights = group_advantages(quality).flatten(), sample_weights.flatten()
    weights = (start + 0.8 * torch.randn(start.shape, generator=generator)).requires_grad_()
    kept = sample_weights.sum() * LENGTH
    whole, stats = objective(weights, result, advantages, sample_weights, level=level, reference=start)
    (expected,) = torch.autograd.grad(normalise(whole, kept), weights)
    assert stats["clip_fraction"] > 0 and expected.abs().max() > 1e-3
    split = torch.zeros_like(expected)
    for chunk in torch.arange(16).split(parts):
        part = type(result)(*(None if field is None else field[chunk] for field in result))
        total, _ = objective(weights, part, advantages[chunk], sample_weights[chunk], level=level, reference=start)
        split += torch.autograd.grad(normalise(total, kept), weights)[0]
    torch.testing.assert_close(split, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_reward_rises_on_a_toy_problem(level):
    """Tokens that all agree: the positions must coordinate, and one step must learn to commit to one code."""
    start = torch.zeros(LENGTH * (CODES + 1), LENGTH * CODES)
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.1)
    rewards = []
    for iteration in range(40):
        steps = torch.tensor([1, 2]).repeat_interleave(32)
        noise = draw_noise(64, 2, LENGTH, seed=iteration)
        result = rollout(lambda t, n: policy(weights, t, n), steps, noise, length=LENGTH, mask_id=CODES)
        reward = (result.tokens == result.tokens[:, :1]).float().mean(1).view(8, 8)
        rewards.append(reward.mean().item())
        sample_weights = std_percentile(reward, percentile=10).flatten()
        advantages = group_advantages(reward).flatten()
        for _ in range(2):
            total, stats = objective(
                weights, result, advantages, sample_weights, level=level, beta=0.01, reference=start
            )
            optimizer.zero_grad()
            normalise(total, stats["kept"]).backward()
            optimizer.step()
    assert sum(rewards[:3]) / 3 < 0.65 and sum(rewards[-3:]) / 3 > 0.9
