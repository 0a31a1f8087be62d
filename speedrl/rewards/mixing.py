"""The quality that a training rewards: one score or a standardised mixture of several, with running moments."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from speedrl.method.rewards import Moments, disagreeing, mixture, observe
from speedrl.models.generator import Generator
from speedrl.rewards.loading import Score, load_qualities, rate

TREND = 20  # iterations over which qualities are watched for disagreement


class Reward:
    """Scores by name, their weights, and what was observed of them. Without scores ("none") the quality is 0."""

    def __init__(self, scores: dict[str, Score], weights: dict[str, float], *, clip: float | None, device: str):
        self.scores, self.weights, self.clip, self.device = scores, weights, clip, device
        self.moments = {name: Moments() for name in scores}
        self.recent: deque[dict[str, float]] = deque(maxlen=TREND)

    def parts(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Each score of images [B, 3, H, W] of B prompts: float32 [B]. ValueError where one is not finite."""
        return {name: rate(name, score, images, prompts).to(self.device) for name, score in self.scores.items()}

    def observe(self, parts: dict[str, Tensor], size: int) -> Tensor:
        """The rewarded quality of `size` samples, float32 [size], after taking their parts into the moments."""
        if not parts:
            return torch.zeros(size, device=self.device)
        self.moments = {name: observe(self.moments[name], part) for name, part in parts.items()}
        if len(parts) > 1:
            self.recent.append({name: part.mean().item() for name, part in parts.items()})
        return self.mixed(parts)

    def mixed(self, parts: dict[str, Tensor]) -> Tensor:
        """The rewarded quality by the present moments, [B]."""
        return mixture(parts, self.weights, self.moments, clip=self.clip)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The rewarded quality of images by the present moments, with a gradient where the images have one."""
        return self.mixed(self.parts(images, prompts)) if self.scores else images.new_zeros(len(images))

    def falling(self) -> list[str]:
        """Qualities that fall while what is rewarded rises: the reward may be gamed."""
        return disagreeing(self.recent, self.weights) if len(self.scores) > 1 else []

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON holds it."""
        return {"moments": self.moments, "recent": list(self.recent)}

    def restore(self, record: dict[str, Any]) -> None:
        """Takes up what `record` kept, of scores of the same names."""
        for name in self.scores.keys() & record.get("moments", {}).keys():
            self.moments[name] = Moments(*record["moments"][name])
        self.recent.extend(row for row in record.get("recent", ()) if row.keys() == self.scores.keys())


def open_reward(
    quality: Any,
    generator: Generator,
    weights: Sequence[str] = (),
    *,
    clip: float | None = None,
    bf16: bool | None = None,
    device: str = "cpu",
    prompts: Sequence[str] | None = None,
) -> Reward:
    """The reward of `load_qualities`, tried on the run's own prompts and at the generator's image size."""
    scores, shares = load_qualities(quality, device=device, weights=weights, bf16=bf16, prompts=prompts,
                                    size=generator.size)
    return Reward(scores, shares, clip=clip, device=device)
