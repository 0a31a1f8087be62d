"""What the reward would be with another token at a place, to first order: so that each token has its own credit.

The reward of a picture says little of any one of the hundred tokens that a step draws, and as much of the others. But
a picture is its tokens' embeddings, decoded, and where the reward has a gradient its slope at an embedding says what
each other token there would have changed: a linear critic that needs no training. With it the policy gradient is summed
over all codes in place of the one that was drawn (mean actor-critic, arXiv 1709.00503; with this critic it is the
straight-through estimator, arXiv 1308.3432). It is biased: by what is not linear, and as it leaves out what a token
changes in the tokens drawn after it.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def reward_slopes(
    tokens: Tensor, codes: Tensor, reward: Callable[[Tensor, list[str]], Tensor], texts: list[str], *, batch: int
) -> Tensor:
    """Gradient of each picture's reward at its tokens' embeddings: tokens int64 [B, L] -> float32 [B, L, C].

    codes float32 [V, C] are the embeddings; reward(embeddings [n, L, C], n texts) -> [n], `batch` pictures at a time.
    """
    found = []
    for start in range(0, len(tokens), batch):
        at = codes[tokens[start : start + batch]].requires_grad_()
        (slope,) = torch.autograd.grad(reward(at, texts[start : start + batch]).sum(), at)
        found.append(slope)
    return torch.cat(found)


def expected_gain(logits: Tensor, slopes: Tensor, codes: Tensor) -> Tensor:
    """What the policy expects of each place, sum_v pi(v) slope . code(v): its gradient is that of the reward.

    logits [P, V], slopes float32 [P, C], codes float32 [V, C] -> float32 [P]. What is the same for all codes, as the
    reward that the picture had, adds no gradient, so none is taken off.
    """
    return (logits.float().softmax(-1) * (slopes @ codes.T)).sum(-1)
