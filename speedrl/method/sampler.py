"""How images are drawn: one value, which a generator has and rollouts, evaluation and training share."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from speedrl.method.schedules import mask_ratio

ORDERS = ("confidence", "random", "halton")


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The settings of parallel decoding, whatever the prompt and the step count. ValueError for what is out of range.

    guidance: scale of classifier-free guidance; 1 is the conditional network alone.
    schedule: the mask schedule, as of `mask_ratio`.
    order: "confidence" reveals the likeliest tokens first, "random" any, "halton" those of `halton_order`.
    temperature: that of the reveal order at the first step; it falls linearly to 0 at the last.
    remask: share of the tokens that the last quarter of 6 steps or more draws again (`remasking_steps`).
    shared_noise: whether all positions of a step draw their tokens by the same noise over the codes. Each token keeps
        its distribution; positions of alike distributions draw alike tokens, so few steps agree on what is left open.
    scalars: float32 [7, 4], the table of a sampler search (`scalars_at`), or None.
    """

    guidance: float = 1.0
    schedule: str = "cosine"
    order: str = "confidence"
    temperature: float = 2.0
    remask: float = 0.0
    shared_noise: bool = False
    scalars: Tensor | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.guidance < math.inf:
            raise ValueError(f"`guidance` must be at least 1, got {self.guidance:g}; 1 is without guidance")
        mask_ratio(torch.zeros(()), kind=self.schedule)
        if self.order not in ORDERS:
            raise ValueError(f"`order` must be {', '.join(ORDERS)}, got {self.order!r}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"`temperature` must be finite and not negative, got {self.temperature}")
        if not 0 <= self.remask <= 1:
            raise ValueError(f"`remask` is a share of the tokens, 0 to 1, got {self.remask}")

    def replace(self, **changes: Any) -> "Sampler":
        """The sampler with these settings in place of its own; a setting of None stays as it is."""
        return dataclasses.replace(self, **{name: value for name, value in changes.items() if value is not None})

    def settings(self) -> dict[str, Any]:
        """All but the scalars, by name, as JSON holds them."""
        return {name: value for name, value in vars(self).items() if name != "scalars"}

    def evaluations(self, steps: int) -> int:
        """Network evaluations of an image (NFE) in so many steps: one a step, two with guidance."""
        return steps * (1 if self.guidance == 1 else 2)
