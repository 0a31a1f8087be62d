"""Filters as weights, not as removal: shapes stay static for torch.compile and ranks stay in step."""

import torch
from torch import Tensor


def std_percentile(quality: Tensor, *, percentile: float) -> Tensor:
    """Keep the groups whose rewards differ enough to learn from: quality [G, n] -> weights float32 [G, n], 0 or 1.

    A group is kept if its standard deviation is at least the percentile (0 to 100, linear interpolation) of those of
    the batch's G groups: 0 keeps all, 100 only the widest (Speed-RL, arXiv 2512.01094). Pass the QUALITY reward: a
    speed reward over mixed step counts would widen every group. ValueError outside 0 to 100.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"the percentile of the reward's standard deviation must be 0 to 100, got {percentile}")
    std = quality.float().std(1, correction=0)
    return (std >= torch.quantile(std, percentile / 100))[:, None].expand_as(quality).float()


def low_quality(quality: Tensor, *, threshold: float | None) -> Tensor:
    """Weight 0 for samples of quality below the threshold: quality [G, n] -> weights float32 [G, n], 0 or 1.

    `threshold` in units of the quality; None keeps all. The advantages still count the samples left out.
    """
    if threshold is None:
        return torch.ones_like(quality, dtype=torch.float32)
    return (quality >= threshold).float()
