"""Rewards as numbers: speed, mixtures of qualities, and how they combine."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def speed_reward(steps: Tensor, *, max_steps: int) -> Tensor:
    """Share of the halvings of `max_steps` that were saved, 1 - log2(steps) / log2(max_steps): int64 [B] -> [B].

    No units: 0 at max_steps, 1 at one step, negative beyond max_steps; each halving is worth the same. The share of
    steps saved would pay eight times more for 16 -> 8 than for 2 -> 1. Guidance doubles the network evaluations of
    every step and leaves it unchanged. Where the step count is drawn independently of the policy, this term has zero
    expected gradient: it pays for speed where the policy chooses the step count. ValueError for max_steps below 1.
    """
    if max_steps < 1:
        raise ValueError(f"`max_steps` must be at least 1, got {max_steps}")
    most = math.log2(max_steps)
    return (most - steps.float().log2()) / (most or 1)


def combine(quality: Tensor, speed: Tensor, *, steps_reward: float, gate: float | None = None) -> Tensor:
    """quality + steps_reward * speed, [B] and [B] -> [B]; with a gate, speed counts only where quality >= gate.

    `steps_reward` is the quality that saving all steps would be worth; `gate` is in units of the quality.
    """
    bonus = steps_reward * speed
    return quality + (bonus if gate is None else torch.where(quality >= gate, bonus, 0))


class Moments(NamedTuple):
    """Running count, mean and sum of squared deviations of one quality."""

    count: float = 0.0  # type: ignore[assignment]  # the name of a tuple's method
    mean: float = 0.0
    squares: float = 0.0


def observe(moments: Moments, values: Tensor) -> Moments:
    """`moments` with float [B] more values (Chan, Golub and LeVeque 1983)."""
    count, values = moments.count + len(values), values.double()
    away = values.mean().item() - moments.mean
    own = (values - values.mean()).square().sum().item()
    return Moments(
        count,
        moments.mean + away * len(values) / count,
        moments.squares + own + away**2 * moments.count * len(values) / count,
    )


def mixture(
    parts: dict[str, Tensor], weights: dict[str, float], moments: dict[str, Moments], *, clip: float | None = None
) -> Tensor:
    """The quality that is rewarded: float32 [B] each -> float32 [B].

    One part is itself, times its weight. Of several each is first standardised by its running mean and standard
    deviation, so that weights mean the same whatever the units: sum over parts of w (x - mean) / std. With `clip`, no
    part counts as further than `clip` standard deviations from its mean, for one part too, in its own units.
    """
    rewarded = [name for name, weight in weights.items() if weight]
    total = torch.zeros_like(next(iter(parts.values())))
    for name in rewarded:
        count, mean, squares = moments[name]
        std = max((squares / max(count, 1)) ** 0.5, 1e-6)
        value = parts[name]
        if clip is not None:
            value = value.clamp(mean - clip * std, mean + clip * std)
        total = total + weights[name] * (value if len(rewarded) == 1 else (value - mean) / std)
    return total


def trend(values: Sequence[float]) -> float:
    """How many standard errors the slope of a least-squares line is from 0; 0 for fewer than 4 values."""
    count = len(values)
    if count < 4:
        return 0.0
    x = torch.arange(count, dtype=torch.float64)
    x, y = x - x.mean(), torch.tensor(values, dtype=torch.float64)
    slope = (x * y).sum() / x.square().sum()
    residual = (y - y.mean() - slope * x).square().sum()
    error = (residual / (count - 2) / x.square().sum()).sqrt()
    return (slope / error.clamp(min=1e-12)).item()


def disagreeing(history: Sequence[dict[str, float]], weights: dict[str, float], *, sure: float = 3.0) -> list[str]:
    """Qualities that fall while what is rewarded rises, over `history`, the means of an iteration each.

    A quality falls or rises where its trend is `sure` standard errors from 0. A warning of reward hacking: the names
    of falling parts, rewarded or of weight 0, where any rewarded part rises.
    """
    slopes = {name: trend([row[name] for row in history]) for name in weights}
    if not any(weights[name] and slope > sure for name, slope in slopes.items()):
        return []
    return [name for name, slope in slopes.items() if slope < -sure]
