"""Tuning: a few scalars for each step count that say how it is sampled, learned beside the weights.

In few steps the hand-set sampler of many is far from the best: 4 steps of the cosine schedule reveal 20 of 256 tokens
at once where nothing is known yet. The scalars are factors on what is hand-set, so that 1 leaves it as it is. Each
rollout tries its own, drawn around the learned ones, and its reward tells which way is better: policy gradients with
parameter-based exploration (PGPE; Sehnke et al., Neural Networks 23, 2010).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from speedrl.method.schedules import seeded

SPREAD = (0.2, 0.4, 0.2, 0.2)  # of what rollouts try, in logs of the scalars
OCTAVES = 7  # 1, 2, 4 .. 64 steps have scalars of their own


class Tuning(NamedTuple):
    """The scalars of B samples: float32 [B] each, positive."""

    warp: Tensor  # exponent of the progress along the mask schedule: above 1 less is revealed early
    heat: Tensor  # factor on the temperature of the confidence noise
    first: Tensor  # factor on the logits at the first step
    last: Tensor  # and at the last; in between on a straight line


def untuned(batch: int, *, device: torch.device | str = "cpu") -> Tuning:
    """The hand-set sampler: all 1."""
    return Tuning(*torch.ones(4, batch, device=device))


def shares(steps: Tensor) -> Tensor:
    """How much each octave says of step counts int64 [B]: float32 [B, OCTAVES], rows of sum 1, linear in log2."""
    at = steps.float().log2().clamp(max=OCTAVES - 1)[:, None]
    return (1 - (at - torch.arange(OCTAVES, device=steps.device)).abs()).clamp(min=0)


def settled(table: Tensor, steps: Tensor) -> Tuning:
    """The learned scalars of step counts int64 [B]: table float32 [OCTAVES, 4], their logs at 1, 2, 4 .. 64 steps."""
    return Tuning(*(shares(steps) @ table.to(steps.device)).exp().unbind(1))


def explored(table: Tensor, steps: Tensor, *, seed: int, iteration: int) -> tuple[Tuning, Tensor]:
    """Scalars of B samples drawn around the learned ones, and the standard normal noise float32 [B, 4] in them."""
    noise = torch.randn(len(steps), len(SPREAD), generator=seeded(f"{seed},{iteration},tuning"))
    logs = shares(steps.cpu()) @ table + noise * torch.tensor(SPREAD)
    return Tuning(*logs.exp().to(steps.device).unbind(1)), noise


def tunings(
    table: Tensor | None, steps: Tensor, *, explore: bool, seed: int, iteration: int
) -> tuple[Tuning | None, Tensor | None]:
    """The scalars to sample with and the noise in them: `explored`, or else `settled`; none of no table."""
    if table is None:
        return None, None
    return explored(table, steps, seed=seed, iteration=iteration) if explore else (settled(table, steps), None)


def described(table: Tensor, steps: Tensor) -> dict[str, float]:
    """The learned scalars by name, at the mean of step counts int64 [B]."""
    at_mean = settled(table, steps.float().mean().round().long()[None])
    return {name: value.item() for name, value in at_mean._asdict().items()}


def improved(
    table: Tensor, seen: Tensor, steps: Tensor, noise: Tensor, advantages: Tensor, *, rate: float
) -> tuple[Tensor, Tensor]:
    """The table after one step along the gradient of the expected reward, in units of the spread, and what was seen.

    steps int64 [B], noise float32 [B, 4] as of `explored`, advantages float32 [B], those of the whole rollouts, which
    are standardised within each octave, as rewards vary far less at one step than at four. seen float32 [OCTAVES] are
    the batches that each octave has learned from, a part of one for its part of the samples: by that part its step is
    shorter, and by its own past, rate / (1 + seen / 8). So an octave that has few samples of each batch learns in more
    batches what it would have learned alone, and is not carried off by its noise.
    """
    of_octave, advantages = shares(steps.cpu()), advantages.cpu()
    deviation = (of_octave.T @ advantages.square() / of_octave.sum(0).clamp(min=1e-6)).sqrt() + 1e-4
    told = of_octave.T @ (noise * advantages[:, None]) / (len(steps) * deviation[:, None])
    lengths = rate / (1 + seen / 8)
    return table + lengths[:, None] * torch.tensor(SPREAD) * told, seen + of_octave.mean(0)


def sharpness(tuning: Tuning, steps: Tensor) -> Tensor:
    """Factor on the logits at each step: steps int64 [B] -> float32 [B, S], `last` past a sample's end."""
    step = torch.arange(int(steps.max()), device=steps.device)
    progress = (step / (steps[:, None] - 1).clamp(min=1)).clamp(max=1)
    return tuning.first[:, None] + progress * (tuning.last - tuning.first)[:, None]
