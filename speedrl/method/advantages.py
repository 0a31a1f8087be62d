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
    """Quality less the mean of the prompt's OTHER samples of the same step count, so samples of unlike cost compare.

    quality float [G, n], steps int64 [G, n] -> residuals float32 [G, n], and bool [G, n], whether there is another
    sample to compare with; where there is none, the residual is 0. The baseline does not depend on the sample itself,
    so it adds no bias. Other prompts do not serve: in few steps some prompts are far easier than others. Where all
    counts are equal, advantages within a group are those of the quality itself.
    """
    quality = quality.float()
    if (steps == steps[0, 0]).all():
        return quality - quality.mean(), torch.ones_like(quality, dtype=torch.bool)
    same = (steps[:, :, None] == steps[:, None]).float() - torch.eye(steps.shape[1], device=steps.device)
    others = same.sum(-1)
    baseline = torch.einsum("gij,gj->gi", same, quality) / others.clamp(min=1)
    known = others > 0
    return torch.where(known, quality - baseline, 0), known
