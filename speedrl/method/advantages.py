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
        raise ValueError(f"--advantage-std must be {', '.join(SCALES)}, got {std!r}")
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
        raise ValueError("--group-size must be at least 2: advantages compare the samples of one prompt")
    rewards = rewards.float()
    return (rewards - rewards.mean(1, keepdim=True)) * (n / (n - 1))


def count_residuals(quality: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Quality less the mean quality of the same step count over the OTHER prompts: so samples of unlike cost compare.

    quality float [G, n], steps int64 [G, n] -> residuals float32 [G, n], and bool [G, n], whether another prompt has a
    sample of that count; where none has, the residual is 0. The baseline does not depend on the prompt's own samples,
    so it adds no bias. A mean of the prompt's own samples of a count would be the sample itself where it is the only
    one. Where all counts are equal, advantages within a group are those of the quality itself.
    """
    quality = quality.float()
    residuals, known = torch.zeros_like(quality), torch.zeros_like(quality, dtype=torch.bool)
    if (steps == steps[0, 0]).all():
        return quality - quality.mean(), torch.ones_like(known)
    for count in torch.unique(steps):
        same = (steps == count).float()
        sums, numbers = (same * quality).sum(1, keepdim=True), same.sum(1, keepdim=True)
        others = numbers.sum() - numbers
        baseline = (sums.sum() - sums) / others.clamp(min=1)
        here = (steps == count) & (others > 0)
        residuals = torch.where(here, quality - baseline, residuals)
        known |= here
    return residuals, known
