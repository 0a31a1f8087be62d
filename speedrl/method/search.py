"""Search of a few sampler scalars for each step count, without training.

The sampler that a model comes with is set by hand for many steps. In few steps it is far from the best one: 4 steps of
the cosine schedule reveal 20 of 256 tokens at once where nothing is known yet. The scalars are factors on the given
sampler, so that 1 leaves it as it is. The search is PGPE (Sehnke et al., Neural Networks 23, 2010): each rollout tries
scalars drawn around the present ones, and the gradient of the expected reward moves these.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from speedrl.method.schedules import seeded

SPREAD = (0.2, 0.4, 0.2, 0.2)  # standard deviation of what rollouts try, in logs of the scalars
OCTAVES = 7  # step counts 1, 2, 4 .. 64 have scalars of their own


class Scalars(NamedTuple):
    """The scalars of B samples: float32 [B] each, positive."""

    schedule_power: Tensor  # exponent of the progress along the mask schedule: above 1 fewer tokens come early
    order_temperature: Tensor  # factor on the temperature of the reveal order
    logit_scale_first: Tensor  # factor on the logits at the first step
    logit_scale_last: Tensor  # and at the last; linear in between


class Search(NamedTuple):
    """What a search knows: `table` float32 [OCTAVES, 4], logs of the scalars; `seen` float32 [OCTAVES], batches."""

    table: Tensor
    seen: Tensor


def new_search(table: Tensor | None = None) -> Search:
    """A search that starts from a table, or from the sampler as it is given."""
    return Search(torch.zeros(OCTAVES, len(SPREAD)) if table is None else table.cpu(), torch.zeros(OCTAVES))


def octave_weights(steps: Tensor) -> Tensor:
    """How much each octave says of step counts int64 [B]: float32 [B, OCTAVES], rows of sum 1, linear in log2."""
    at = steps.float().log2().clamp(max=OCTAVES - 1)[:, None]
    return (1 - (at - torch.arange(OCTAVES, device=steps.device)).abs()).clamp(min=0)


def scalars_at(table: Tensor | None, steps: Tensor) -> Scalars:
    """The scalars of step counts int64 [B] out of a table of `Search`; all 1 without a table."""
    logs = torch.zeros(len(steps), len(SPREAD), device=steps.device)
    if table is not None:
        logs = octave_weights(steps) @ table.to(steps.device)
    return Scalars(*logs.exp().unbind(1))


def perturbed(search: Search, steps: Tensor, *, seed: int, round: int) -> tuple[Scalars, Tensor]:
    """Scalars of B samples drawn around the present ones, and the standard normal noise float32 [B, 4] in them.

    Samples 2i and 2i + 1 have opposite noise. Where they draw the same prompt from the same noise in the same steps,
    what these do to the reward cancels (symmetric sampling, Sehnke et al., section 2.2).
    """
    half = torch.randn((len(steps) + 1) // 2, len(SPREAD), generator=seeded(f"{seed},{round},search"))
    noise = torch.stack([half, -half], 1).flatten(0, 1)[: len(steps)]
    logs = octave_weights(steps.cpu()) @ search.table + noise * torch.tensor(SPREAD)
    return Scalars(*logs.exp().to(steps.device).unbind(1)), noise


def updated(search: Search, steps: Tensor, noise: Tensor, advantages: Tensor, *, rate: float = 2.0) -> Search:
    """The search after one step along the gradient of the expected reward, in units of the spread.

    steps int64 [B], noise float32 [B, 4] as of `perturbed`, advantages float32 [B] of the whole rollouts. They are
    standardised within each octave, as rewards vary less at one step than at four. An octave's step length falls with
    the batches that it has seen, rate / (1 + seen / 8), and a part of a batch counts as that part.
    """
    of_octave, advantages = octave_weights(steps.cpu()), advantages.cpu()
    deviation = (of_octave.T @ advantages.square() / of_octave.sum(0).clamp(min=1e-6)).sqrt() + 1e-4
    direction = of_octave.T @ (noise * advantages[:, None]) / (len(steps) * deviation[:, None])
    lengths = rate / (1 + search.seen / 8)
    return Search(search.table + lengths[:, None] * torch.tensor(SPREAD) * direction, search.seen + of_octave.mean(0))
