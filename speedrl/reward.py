"""Rewards: speed, and its combination with quality."""

import torch
from torch import Tensor


def speed_reward(steps: Tensor, *, max_steps: int) -> Tensor:
    """Share of the network calls saved against `max_steps`, 1 - steps / max_steps: int64 [B] -> float32 [B].

    No units: 0 at max_steps, 1 - 1 / max_steps at one step, negative beyond max_steps. Guidance doubles the calls of
    every step and leaves the share unchanged. Where the step count is drawn independently of the policy, this term
    has zero expected gradient: it only shifts the baseline between step counts. It pays for speed where the policy
    chooses the step count. ValueError for max_steps below 1.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    return 1 - steps.float() / max_steps


def combine(quality: Tensor, speed: Tensor, *, steps_reward: float, gate: float | None = None) -> Tensor:
    """quality + steps_reward * speed, [B] and [B] -> [B]; with a gate, speed counts only where quality >= gate.

    `steps_reward` is the quality that saving every network call would be worth; `gate` is in units of the quality.
    """
    bonus = steps_reward * speed
    return quality + (bonus if gate is None else torch.where(quality >= gate, bonus, 0))
