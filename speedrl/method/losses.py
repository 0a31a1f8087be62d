"""The clipped policy loss, the expected gain of a reward gradient, and their normalisation."""

from collections.abc import Callable

import torch
from torch import Tensor


def policy_loss(
    log_ratio: Tensor, advantages: Tensor, weights: Tensor, *, clip_range: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7), negated and summed by weight.

    log_ratio float32 of any shape, log of new over old probability of each event: a token, a step or a whole sample;
    advantages and weights broadcast to it, weight 0 leaves an event out -> (sum as a scalar, statistics). Divide by the
    global weight of what is kept with `normalise`, not by this batch's: only then do micro-batches and ranks add up.
    Statistics, detached scalars: "clipped", the weight of the events whose gradient clipping took away, "ratio_max",
    and "weight", the sum of the weights. No host synchronisation.

    >>> loss, stats = policy_loss(torch.zeros(3), torch.tensor([1.0, -1.0, 2.0]), torch.ones(3))
    >>> loss.item(), stats["clipped"].item()
    (-2.0, 0.0)
    """
    weights = weights.expand_as(log_ratio)
    kept = weights > 0
    # before the exponential: an infinite ratio at weight 0 would make the gradient NaN
    ratio = torch.where(kept, log_ratio, 0).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
    with torch.no_grad():
        clipped = ((ratio > 1 + clip_range) & (advantages > 0)) | ((ratio < 1 - clip_range) & (advantages < 0))
        stats = {
            "clipped": (clipped * weights).sum(),
            "ratio_max": torch.where(kept, ratio, 0).amax() if ratio.numel() else ratio.new_zeros(()),
            "weight": weights.sum(),
        }
    return -(surrogate * weights).sum(), stats


def normalise(total: Tensor, kept: Tensor) -> Tensor:
    """total / kept, scalars; 0 with a gradient of 0, not NaN, where nothing is kept."""
    return torch.where(kept > 0, total / torch.where(kept > 0, kept, 1), 0)


def reward_slopes(
    tokens: Tensor, codes: Tensor, reward: Callable[[Tensor, list[str]], Tensor], texts: list[str], *, batch: int
) -> Tensor:
    """Gradient of each image's reward at its tokens' embeddings: tokens int64 [B, L] -> float32 [B, L, C].

    codes float32 [V, C] are the embeddings; reward(embeddings [n, L, C], n texts) -> [n], `batch` images at a time.
    """
    found = []
    for start in range(0, len(tokens), batch):
        at = codes[tokens[start : start + batch]].requires_grad_()
        (slope,) = torch.autograd.grad(reward(at, texts[start : start + batch]).sum(), at)
        found.append(slope)
    return torch.cat(found)


def expected_gain(logits: Tensor, slopes: Tensor, codes: Tensor) -> Tensor:
    """First-order reward that the policy expects at each position: sum over v of pi(v) slope . code(v).

    logits [P, V], slopes float32 [P, C] of `reward_slopes`, codes float32 [V, C] -> float32 [P]. Its gradient is the
    straight-through estimator of the reward (arXiv 1308.3432), as of white-box reward backpropagation (ReFL, arXiv
    2304.05977; DRaFT, arXiv 2309.17400). It is biased: by what is not linear, and as it leaves out what a token changes
    in the tokens drawn after it.
    """
    return (logits.float().softmax(-1) * (slopes @ codes.T)).sum(-1)
