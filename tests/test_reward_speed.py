"""The speed reward: its formula, and when it has a gradient at all."""

import pytest
import torch

from speedrl.method.divergences import ce_kl
from speedrl.method.ratios import LIKELIHOODS
from speedrl.method.rewards import combine, speed_reward
from speedrl.method.steps import step_log_probs, step_loss
from speedrl.training import grpo_loss
from tests.toys import Toy, every_step, every_trajectory, joined, log_likelihood


def test_speed_is_the_share_of_the_halvings_saved_each_worth_the_same():
    reward = speed_reward(torch.tensor([16, 8, 4, 2, 1, 32]), max_steps=16)
    assert reward.tolist() == [0, 0.25, 0.5, 0.75, 1, -0.25] and reward.dtype == torch.float32
    for most in (2, 12, 64):
        assert speed_reward(torch.tensor([most, 1]), max_steps=most).tolist() == pytest.approx([0, 1], abs=1e-6)
        counts = torch.tensor([most, most / 2, most / 4])
        one, two = speed_reward(counts, max_steps=most).diff().tolist()
        assert one == pytest.approx(two, rel=1e-5) and one > 0
    assert speed_reward(torch.tensor([1, 1]), max_steps=1).tolist() == [0, 0], "nothing can be saved of one step"
    with pytest.raises(ValueError, match="`max_steps` must be at least 1, got 0"):
        speed_reward(torch.tensor([1]), max_steps=0)


def test_combination_weighs_speed_and_gates_it_by_quality():
    quality, speed = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1.0, 0.5, -1.0])
    torch.testing.assert_close(combine(quality, speed, steps_reward=0.5), torch.tensor([0.6, 0.75, 0.4]))
    torch.testing.assert_close(combine(quality, speed, steps_reward=0.5, gate=0.5), torch.tensor([0.1, 0.75, 0.4]))
    assert torch.equal(combine(quality, speed, steps_reward=0.0), quality)


def expected_gradient(likelihood: str, rewards: dict[int, float]) -> torch.Tensor:
    """Mean gradient of the loss over all trajectories of three tokens in 1 or 2 steps, either as likely."""
    policy = Toy(3, 2).moved(0.0)
    every = joined(*(every_trajectory(policy, n, schedule="linear") for n in rewards))
    p = torch.cat([log_likelihood(policy, every[every.steps == n]).exp() / 2 for n in rewards]).detach()
    reward = torch.tensor([rewards[n] for n in every.steps.tolist()])
    loss, _ = grpo_loss(policy, None, every, reward, p, every_step(every), likelihood=LIKELIHOODS[likelihood],
                        kl=ce_kl, kl_weight=0.0)
    return torch.autograd.grad(loss, policy.weights)[0]


def test_speed_has_no_expected_gradient_where_the_step_count_is_given():
    speed = {n: speed_reward(torch.tensor([n]), max_steps=4).item() for n in (1, 2)}
    assert expected_gradient("exact", speed).abs().max() < 1e-5
    assert expected_gradient("token", speed).abs().max() > 0.005, "the surrogate's selection bias has one"


def test_speed_has_the_true_gradient_where_the_policy_chooses_the_step_count():
    bias, weight = torch.tensor([0.2, -0.3], requires_grad=True), torch.zeros(2, 4)
    speed = speed_reward(torch.tensor([1, 2]), max_steps=4)
    log_p = step_log_probs(bias, weight, torch.ones(2, 4))
    # each count once, weighted by its probability
    loss = step_loss(log_p, torch.arange(2), log_p[0].exp().detach() * speed)
    (gradient,) = torch.autograd.grad(loss, bias, retain_graph=True)
    (true,) = torch.autograd.grad(-(log_p[0].exp() * speed).sum(), bias)
    torch.testing.assert_close(gradient, true)
    assert gradient[0] < -0.02 < 0.02 < gradient[1]  # towards fewer steps
