"""Filters as weights, not as removal: shapes stay static for torch.compile and ranks stay in step."""

import torch
from torch import Tensor


def std_percentile(quality: Tensor, *, percentile: float, keep: Tensor | None = None) -> Tensor:
    """Keep the groups whose qualities differ enough to learn from: quality [G, n] -> weights float32 [G, n], 0 or 1.

    A group is kept if its standard deviation is at least the percentile (0 to 100, linear interpolation) of those of
    the batch's G groups: 0 keeps all, 100 only the widest (Speed-RL, arXiv 2512.01094). `keep` bool [G, n] leaves
    samples out of the deviations. Where step counts differ, pass the residuals of `count_residuals`: the deviation of
    the quality itself mostly measures the mix of counts. ValueError outside 0 to 100.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"--percentile must be 0 to 100, got {percentile}")
    quality = quality.float()
    weights = torch.ones_like(quality) if keep is None else keep.float()
    counts = weights.sum(1, keepdim=True).clamp(min=1)
    mean = (quality * weights).sum(1, keepdim=True) / counts
    std = (((quality - mean) * weights).square().sum(1) / counts.squeeze(1)).sqrt()
    return (std >= torch.quantile(std, percentile / 100))[:, None].expand_as(quality).float()


def low_quality(quality: Tensor, *, threshold: float) -> Tensor:
    """Weight 0 for samples of low quality: quality [G, n] -> weights float32 [G, n], 0 or 1.

    `threshold` is in standard deviations of the batch from its mean, like -2; -inf keeps all (Speed-RL, arXiv
    2512.01094). Where step counts differ, pass the residuals of `count_residuals`: an absolute threshold would delete
    the samples of few steps. The advantages still count the samples left out.
    """
    if threshold == -torch.inf:
        return torch.ones_like(quality, dtype=torch.float32)
    quality = quality.float()
    return (quality >= quality.mean() + threshold * quality.std(correction=0)).float()
