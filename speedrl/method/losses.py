"""The clipped policy loss, as a sum over tokens, and its normalisation."""

import torch
from torch import Tensor


def clipped_loss(
    log_ratio: Tensor, advantages: Tensor, weights: Tensor, *, clip_range: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7), negated and summed over tokens by weight.

    log_ratio float32 [B, L] or [B, 1], advantages [B] or as log_ratio, weights [B, L] (0 leaves a token out) -> (sum as
    a scalar, statistics). Divide by the global weight of the kept tokens with `normalise`, not by this batch's: only
    then do micro-batches and ranks add up. Statistics, detached scalars, means by weight: "clip_fraction" of the tokens
    whose gradient clipping took away, "approx_kl" of old to new policy in nats (k3), "ratio_mean", "ratio_max", and
    "kept", the sum of the weights. No host synchronisation.
    """
    kept = weights > 0
    # before the exponential: an infinite ratio at weight 0 would make the gradient NaN
    log_ratio = torch.where(kept, log_ratio, 0)
    ratio = log_ratio.exp()
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
    with torch.no_grad():
        total = weights.sum()
        clipped = ((ratio > 1 + clip_range) & (advantages > 0)) | ((ratio < 1 - clip_range) & (advantages < 0))
        stats = {
            "clip_fraction": normalise((clipped * weights).sum(), total),
            "approx_kl": normalise(((ratio - 1 - log_ratio) * weights).sum(), total),
            "ratio_mean": normalise((ratio * weights).sum(), total),
            "ratio_max": torch.where(kept, ratio, 0).amax(),
            "kept": total,
        }
    return -(surrogate * weights).sum(), stats


def normalise(total: Tensor, kept: Tensor) -> Tensor:
    """total / kept, scalars; 0 with a gradient of 0, not NaN, where nothing is kept."""
    return torch.where(kept > 0, total / torch.where(kept > 0, kept, 1), 0)
