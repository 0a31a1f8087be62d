"""The clipped loss, and the whole method on a toy problem."""

import pytest
import torch

from speedrl.method.advantages import group_advantages
from speedrl.method.divergences import ce_kl
from speedrl.method.likelihoods import log_probs
from speedrl.method.losses import policy_loss
from speedrl.method.ratios import LIKELIHOODS
from speedrl.training import grpo_loss
from tests.toys import Toy, every_step, sampled


def test_gradient_at_ratio_one_is_the_policy_gradient():
    """Every token of a small codebook, weighted by its probability: -E[A grad log pi]."""
    logits = torch.randn(6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0])
    log_p = log_probs(logits.expand(6, -1), torch.arange(6))
    loss, _ = policy_loss(log_p - log_p.detach(), advantages, log_p.exp().detach())
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-(log_p.exp() * advantages).sum(), logits)
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 0.1


def test_clipping_zeroes_exactly_the_expected_events():
    ratio = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0])
    log_r = ratio.log().expand(2, -1).clone().requires_grad_()
    advantages = torch.tensor([[1.5], [-1.5]])
    loss, stats = policy_loss(log_r, advantages, torch.ones(2, 7), clip_range=0.2)
    (gradient,) = torch.autograd.grad(loss, log_r)
    assert (gradient[0] == 0).tolist() == [False, False, False, False, False, True, True]
    assert (gradient[1] == 0).tolist() == [True, True, False, False, False, False, False]
    live = gradient != 0
    torch.testing.assert_close(gradient[live], -(ratio * advantages)[live])
    assert stats["clipped"] == 4 and stats["weight"] == 14
    by_hand = sum(max(-a * r, -a * min(max(r, 0.8), 1.2)) for a in (1.5, -1.5) for r in ratio.tolist())
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_events_of_weight_0_count_for_nothing_whatever_their_ratio():
    log_r = torch.tensor([[0.0, 0.1, 500.0], [-0.1, 7.0, torch.inf]], requires_grad=True)
    weights = torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    loss, stats = policy_loss(log_r, torch.ones(2, 1), weights)
    assert stats["weight"] == 4 and stats["clipped"] == 0 and not any(v.requires_grad for v in stats.values())
    assert stats["ratio_max"].item() == pytest.approx(torch.tensor(0.1).exp().item())
    (gradient,) = torch.autograd.grad(loss, log_r)
    assert torch.equal(gradient != 0, weights > 0) and gradient.isfinite().all()


def test_nothing_kept_gives_no_loss_and_no_gradient():
    log_r = torch.tensor([[0.3, torch.inf]], requires_grad=True)
    loss, stats = policy_loss(log_r, torch.tensor([1.0]), torch.zeros(1, 2))
    (gradient,) = torch.autograd.grad(loss, log_r)
    assert loss == stats["weight"] == 0 and torch.equal(gradient, torch.zeros(1, 2))
    assert policy_loss(torch.zeros(0), torch.zeros(0), torch.zeros(0))[1]["ratio_max"] == 0


@pytest.mark.parametrize("likelihood", ["exact", "token"])
def test_reward_rises_on_a_toy_problem(likelihood):
    """Tokens that all agree: the positions must coordinate, and one step must learn to commit to one code."""
    start = Toy(3, 3, weights=torch.zeros(12, 9))
    policy, rewards = start.moved(0.0), []
    optimizer = torch.optim.Adam([policy.weights], lr=0.1)
    for iteration in range(30):
        trajectory = sampled(policy, [1] * 32 + [2] * 32, seed=iteration)
        reward = (trajectory.tokens == trajectory.tokens[:, :1]).float().mean(1).view(8, 8)
        rewards.append(reward.mean().item())
        advantages = group_advantages(reward).flatten()
        for _ in range(2):
            loss, _ = grpo_loss(policy, start, trajectory, advantages, torch.ones(64), every_step(trajectory),
                                likelihood=LIKELIHOODS[likelihood], kl=ce_kl, kl_weight=0.01, on_policy=False)
            optimizer.zero_grad()
            (loss / (64 * 3)).backward()
            optimizer.step()
    assert sum(rewards[:3]) / 3 < 0.65 and sum(rewards[-3:]) / 3 > 0.85
