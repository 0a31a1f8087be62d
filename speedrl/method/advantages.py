"""Advantages of samples within their group."""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """Rewards of G groups of n samples of one prompt each, [G, n] -> float32 [G, n], of sum 0 in every group.

    reward - group mean, divided by (group standard deviation + eps) unless `scale` is off (GRPO, arXiv 2402.03300;
    without scale, Dr. GRPO, arXiv 2503.20783). The standard deviation is the population's (n, not n - 1), so a group
    of one gives 0; equal rewards give exactly 0. `eps` is in units of the reward.
    """
    rewards = rewards.float()
    rewards = rewards - rewards[:, :1]  # the mean of equal numbers is not always that number, but that of zeros is 0
    advantages = rewards - rewards.mean(1, keepdim=True)
    return advantages / (rewards.std(1, correction=0, keepdim=True) + eps) if scale else advantages


def early_advantages(advantages: Tensor, reveal_step: Tensor, steps: int, *, masked: float = 0.9) -> Tensor:
    """Advantages of whole rollouts, float32 [B], at those of their first `steps` steps that see a share `masked` of the
    tokens masked or more, and 0 at the others: float32 [B, steps]; reveal_step int64 [B, L] as `Rollout`'s.

    What the first tokens decide is for the whole picture: how large a thing is, where, in which design. Their worth is
    in what is drawn after them. They are few, so that the noise of the others' part in the reward is little, and the
    states that the pictures of a prompt draw them at are still nearly the same.
    """
    before = reveal_step[:, None] >= torch.arange(steps, device=reveal_step.device)[:, None]  # [B, S, L]
    return advantages[:, None] * (before.float().mean(-1) >= masked)


def step_advantages(values: Tensor, returns: Tensor, steps: Tensor, *, gae_lambda: float) -> Tensor:
    """Each step's own advantage, by generalised advantage estimation (arXiv 1506.02438, equation 16, gamma 1).

    values float32 [B, S] of the states before each step and returns [B], both above their group's mean; steps int64 [B]
    -> [B, S], 0 past a sample's end. gae_lambda 1 is the return less the state's value, without bias; 0 is what the
    step alone changed of the value, with the least variance, and right as far as the values are.
    """
    last = torch.arange(values.shape[1], device=values.device) == steps[:, None] - 1
    after = torch.where(last, returns[:, None], values.roll(-1, 1))
    changes, found = after - values, torch.zeros_like(values)
    for step in reversed(range(values.shape[1])):
        later = found[:, step + 1] if step + 1 < values.shape[1] else 0
        found[:, step] = (changes[:, step] + gae_lambda * later) * (step < steps)
    return found
