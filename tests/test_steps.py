"""The step policy: its distribution, and its gradient against the exact expected reward."""

import itertools

import pytest
import torch

from speedrl.method.advantages import leave_one_out
from speedrl.method.steps import EXPLORATION, StepPolicy, draw_steps, step_choices, step_log_probs, step_loss

CHOICES = 3
REWARD = torch.tensor([[0.2, 0.9, 0.5], [0.7, 0.1, 0.4]])  # of two prompts and three counts
POOLED = torch.tensor([[3.0, 0.0, 4.0, 0.0], [0.0, 0.1, 0.0, 0.0]])


def parameters() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.randn(CHOICES, generator=random), torch.randn(CHOICES, 4, generator=random)


def expected_reward(bias: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """sum over counts k of p_k R_k, the mean over prompts."""
    return (step_log_probs(bias, weight, POOLED).exp() * REWARD).sum(1).mean()


def mean_gradient(n: int, *, baseline: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the loss of groups of n, averaged over all draws of counts by their probability."""
    bias, weight = (p.requires_grad_() for p in parameters())
    log_p = step_log_probs(bias, weight, POOLED)
    total = torch.zeros(())
    for prompt in range(2):  # groups do not depend on each other
        for draw in itertools.product(range(CHOICES), repeat=n):
            drawn, rows = torch.tensor(draw), log_p[prompt].expand(n, -1)
            probability = rows.gather(1, drawn[:, None]).sum().exp().detach()
            rewards = REWARD[prompt][drawn]
            advantages = leave_one_out(rewards[None])[0] if baseline else rewards
            total = total + probability * step_loss(rows, drawn, advantages) / (2 * n)
    return torch.autograd.grad(total, (bias, weight))


@pytest.mark.parametrize("n", [2, 3])
def test_mean_gradient_is_that_of_the_exact_expected_reward(n):
    for found, name in zip(mean_gradient(n, baseline=True), ("bias", "weight"), strict=True):
        flat = found.flatten()
        assert flat.abs().max() > 0.01
        for i in range(len(flat)):
            values = []
            for sign in (1, -1):
                given = dict(zip(("bias", "weight"), parameters(), strict=True))
                given[name].view(-1)[i] += sign * 0.02
                values.append(expected_reward(**given).item())
            # the loss falls where the reward rises
            assert (values[1] - values[0]) / 0.04 == pytest.approx(flat[i].item(), abs=2e-4)


def test_the_score_is_that_of_the_distribution_with_its_floor():
    """Without the floor in the score the gradient is another one, so the test above would notice."""
    bias, weight = (p.requires_grad_() for p in parameters())
    expected = torch.autograd.grad(expected_reward(bias, weight), bias)[0]
    bare = (step_log_probs(bias, weight, POOLED, exploration=0.0).exp() * REWARD).sum(1).mean()
    assert (torch.autograd.grad(bare, bias)[0] - expected).abs().max() > 2e-3


def test_leave_one_out_leaves_the_expected_gradient_unchanged():
    for with_baseline, without in zip(mean_gradient(3, baseline=True), mean_gradient(3, baseline=False), strict=True):
        torch.testing.assert_close(with_baseline, without, atol=1e-6, rtol=1e-5)


def test_probabilities_sum_to_one_and_keep_their_floor():
    bias, weight = torch.tensor([50.0, -50.0, 0.0]), torch.zeros(CHOICES, 4)
    p = step_log_probs(bias, weight, POOLED).exp()
    torch.testing.assert_close(p.sum(1), torch.ones(2))
    assert p.min().item() == pytest.approx(EXPLORATION / CHOICES, rel=1e-4)
    assert p.max().item() == pytest.approx(1 - EXPLORATION * 2 / 3, rel=1e-4)


def test_drawing_inverts_the_distribution():
    log_p = torch.tensor([0.1, 0.0, 0.6, 0.3]).log().expand(1000, -1)
    drawn = draw_steps(log_p, (torch.arange(1000) + 0.5) / 1000)
    assert drawn.bincount(minlength=4).tolist() == [100, 0, 600, 300]
    edges = draw_steps(log_p[:2], torch.tensor([0.0, 1.0]))
    assert edges.tolist() == [0, 3]
    assert draw_steps(torch.zeros(5, 1), torch.rand(5)).tolist() == [0] * 5


@pytest.mark.parametrize(
    ("steps", "choices"),
    [("1-16", [1, 2, 4, 8, 16]), ("3-12", [3, 4, 8, 12]), ("4-4", [4]), ("1-2", [1, 2]), ("8", [8]), (8, [8]),
     ("1,2,4", [1, 2, 4]), ("6, 2,6", [2, 6])],
)
def test_choices_are_a_number_a_list_or_the_powers_of_two_within_a_range_and_its_ends(steps, choices):
    assert step_choices(steps).tolist() == choices


@pytest.mark.parametrize("steps", ["", "x", "1-", "-8", "1-2-4", "2.5", "1,", "auto", "1-x"])
def test_what_says_no_step_counts_is_named(steps):
    with pytest.raises(ValueError, match="`steps` takes a number, a range or a list") as caught:
        step_choices(steps)
    assert repr(steps) in str(caught.value)


@pytest.mark.parametrize("steps", ["0", "0-8", "8-1", "2,0", 0])
def test_step_counts_under_one_and_a_range_that_falls_are_named(steps):
    with pytest.raises(ValueError, match="at least 1, and a range must rise"):
        step_choices(steps)


def test_a_new_policy_spends_as_many_evaluations_on_each_count_and_prompts_differ_by_direction_alone():
    policy = StepPolicy(step_choices("1-8"), 4)
    evaluations = (policy(POOLED).exp() - EXPLORATION / 4) * policy.choices
    torch.testing.assert_close(evaluations, torch.full((2, 4), (1 - EXPLORATION) / (1 + 1 / 2 + 1 / 4 + 1 / 8)))
    policy.weight.data[2, 0], policy.weight.data[1, 1] = 5.0, 5.0
    torch.testing.assert_close(policy(POOLED), policy(7 * POOLED))
    assert policy.modes(POOLED).tolist() == [4, 2]
    assert set(policy.state_dict()) == {"choices", "bias", "weight"}


def test_the_policy_learns_the_count_with_the_best_joint_reward():
    policy, worth = StepPolicy(step_choices("1-8"), 4), torch.tensor([0.1, 0.8, 0.6, 0.3])
    optimizer, random = torch.optim.Adam(policy.parameters(), lr=0.1), torch.Generator().manual_seed(0)
    pooled = POOLED.repeat_interleave(16, 0)
    for _ in range(40):
        log_p = policy(pooled)
        drawn = draw_steps(log_p, torch.rand(32, generator=random))
        step_loss(log_p, drawn, leave_one_out(worth[drawn].view(2, 16)).flatten()).div(32).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert policy.modes(POOLED).tolist() == [2, 2] and (policy(POOLED)[:, 1].exp() > 0.6).all()


def test_prompts_that_fall_into_two_clusters_do_not_settle_on_a_count_before_all_are_compared():
    random = torch.Generator().manual_seed(0)
    direction = torch.randn(192, generator=random)
    pooled = torch.stack([direction, -direction])  # as the text embeddings of the embedded model nearly are
    rewards = torch.tensor([0.27, 0.40, 0.60, 0.64, 0.64])  # by count: those of its base
    policy = StepPolicy(step_choices("1-16"), 192)
    optimizer = torch.optim.AdamW(policy.parameter_groups(0.1), betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(60):
        log_p = policy(pooled[torch.arange(8) % 2].repeat_interleave(16, dim=0))
        drawn = draw_steps(log_p, torch.rand(128, generator=random))
        found = rewards[drawn] + 0.1 * torch.randn(128, generator=random)
        optimizer.zero_grad()
        (step_loss(log_p, drawn, leave_one_out(found.view(8, 16)).flatten() / 0.37) / 128).backward()
        optimizer.step()
    assert policy.modes(pooled).min() >= 8
