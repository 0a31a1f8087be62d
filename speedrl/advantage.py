"""Advantages of samples within their group."""

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
