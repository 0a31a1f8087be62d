"""Filters as weights, not as removal: shapes stay static for torch.compile and ranks stay in step."""

import torch
from torch import Tensor


def std_percentile(quality: Tensor, *, percentile: float, keep: Tensor | None = None) -> Tensor:
    """Keep the groups whose qualities differ enough to learn from: quality [G, n] -> weights float32 [G, n], 0 or 1.

    Of the G groups, the `percentile` per cent (0 to 100, rounded to whole groups) with the smallest standard deviation
    are left out, but for those that tie with one that is kept; 100 leaves the widest (Speed-RL, arXiv 2512.01094).
    `keep` bool [G, n] leaves samples out of the deviations. Where step counts differ, pass the residuals of
    `count_residuals`: the deviation of the quality itself mostly measures the mix of counts. ValueError outside 0 to
    100.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"`percentile` must be 0 to 100, got {percentile}")
    quality = quality.float()
    weights = torch.ones_like(quality) if keep is None else keep.float()
    counts = weights.sum(1, keepdim=True).clamp(min=1)
    mean = (quality * weights).sum(1, keepdim=True) / counts
    std = (((quality - mean) * weights).square().sum(1) / counts.squeeze(1)).sqrt()
    least = std.sort().values[min(dropped_groups(len(std), percentile), len(std) - 1)]
    return (std >= least)[:, None].expand_as(quality).float()


def dropped_groups(groups: int, percentile: float) -> int:
    """How many of so many groups a percentile leaves out."""
    return round(groups * percentile / 100)


def low_quality(quality: Tensor, *, threshold: float) -> Tensor:
    """Weight 0 for samples of low quality: quality [G, n] -> weights float32 [G, n], 0 or 1.

    `threshold` is in standard deviations of the batch from its mean, like -2; -inf keeps all (Speed-RL, arXiv
    2512.01094). Where step counts differ, pass the residuals of `count_residuals`: an absolute threshold would delete
    the samples of few steps. Compute the advantages of what is kept after it: those of a group must sum to 0.
    """
    if threshold == -torch.inf:
        return torch.ones_like(quality, dtype=torch.float32)
    quality = quality.float()
    return (quality >= quality.mean() + threshold * quality.std(correction=0)).float()
