"""Advantages: how much better a sample is than the others of its prompt."""

import torch
from torch import Tensor

SCALES = ("group", "batch", "none")


def group_advantages(rewards: Tensor, *, std: str = "group", keep: Tensor | None = None, eps: float = 1e-4) -> Tensor:
    """Rewards of G groups of n samples of one prompt each, [G, n] -> float32 [G, n], of sum 0 in every group.

    The reward less the group's mean, divided by the standard deviation, plus `eps` in units of the reward: of the group
    with std "group" (GRPO, arXiv 2402.03300), of all samples within their groups with "batch" (as REINFORCE++, arXiv
    2501.03262), or by nothing with "none" (Dr. GRPO, arXiv 2503.20783). `keep` bool [G, n] leaves samples out of the
    means and deviations; their advantage is 0. The standard deviation is the population's, so a group of one gives 0,
    and equal rewards give exactly 0. ValueError for another std.
    """
    if std not in SCALES:
        raise ValueError(f"`std` must be {', '.join(SCALES)}, got {std!r}")
    weights = torch.ones_like(rewards, dtype=torch.float32) if keep is None else keep.float()
    counts = weights.sum(1, keepdim=True).clamp(min=1)
    rewards = rewards.float()
    # the mean of equal numbers is not always that number, but that of zeros is 0
    rewards = (rewards - rewards.gather(1, weights.argmax(1, keepdim=True))) * weights
    advantages = (rewards - rewards.sum(1, keepdim=True) / counts) * weights
    if std == "none":
        return advantages
    dims = 1 if std == "group" else (0, 1)
    squares = advantages.square().sum(dims, keepdim=True) / weights.sum(dims, keepdim=True).clamp(min=1)
    return advantages / (squares.sqrt() + eps)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Each reward less the mean of the other samples of its group (RLOO, arXiv 2402.14740): [G, n] -> float32 [G, n].

    That mean does not depend on the sample, so the policy gradient stays unbiased. ValueError for groups of one.
    """
    n = rewards.shape[1]
    if n < 2:
        raise ValueError("a group needs at least 2 samples: advantages compare those of one prompt")
    rewards = rewards.float()
    return (rewards - rewards.mean(1, keepdim=True)) * (n / (n - 1))


def count_residuals(quality: Tensor, steps: Tensor, *, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quality less the mean of the prompt's OTHER samples of the same step count, so samples of unlike cost compare.

    quality float [G, n], steps int64 [G, n] -> residuals float32 [G, n], and bool [G, n], whether there is another
    sample to compare with; where there is none, the residual is 0. The baseline does not depend on the sample itself,
    so it adds no bias. Other prompts do not serve: some are far easier than others. `keep` bool [G, n] leaves samples
    out. The residuals of a prompt and count sum to 0.

    Among m samples the difference is times sqrt((m - 1) / m), so that residuals vary as the quality does, whatever m.
    """
    quality, steps = quality.float(), steps.long()
    kept = torch.ones_like(quality, dtype=torch.bool) if keep is None else keep.bool()
    same = (steps[:, :, None] == steps[:, None]) & kept[:, :, None] & kept[:, None]
    same = same.float() * (1 - torch.eye(steps.shape[1], device=steps.device))
    others = same.sum(-1)
    # of differences: the mean of equal numbers is not always that number, but that of zeros is 0
    mean_difference = (same * (quality[:, :, None] - quality[:, None])).sum(-1) / others.clamp(min=1)
    return mean_difference * (others / (others + 1)).sqrt(), others > 0
