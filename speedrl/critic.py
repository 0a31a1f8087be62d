"""What the reward would be with another token at a place, to first order: so that each token has its own credit."""

from collections.abc import Callable

import torch
from torch import Tensor


def reward_slopes(
    tokens: Tensor, codes: Tensor, reward: Callable[[Tensor, list[str]], Tensor], texts: list[str], *, batch: int = 16
) -> Tensor:
    """Gradient of each picture's reward at its tokens' embeddings: tokens int64 [B, L] -> float32 [B, L, C]."""
    found = []
    for start in range(0, len(tokens), batch):
        at = codes[tokens[start : start + batch]].requires_grad_()
        (slope,) = torch.autograd.grad(reward(at, texts[start : start + batch]).sum(), at)
        found.append(slope)
    return torch.cat(found)


def expected_gain(logits: Tensor, slopes: Tensor, codes: Tensor) -> Tensor:
    """sum_v pi(v) g . e(v) at each place: logits [P, V], slopes [P, C], codes [V, C] -> float32 [P]."""
    return (logits.float().softmax(-1) * (slopes @ codes.T)).sum(-1)
