"""The clipped policy loss."""

import torch
from torch import Tensor


def policy_loss(
    log_ratio: Tensor, advantages: Tensor, weights: Tensor, *, clip_range: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7), negated and summed by weight.

    log_ratio float32 of any shape, log of new over old probability of each event: a token, a step or a whole sample;
    advantages and weights broadcast to it, weight 0 leaves an event out -> (sum as a scalar, statistics). Divide by the
    tokens of the whole batch, not by this micro-batch's: only then do micro-batches and ranks add up. Statistics,
    detached scalars: "clipped", the weight of the events whose gradient clipping took away, "ratio_max", "approx_kl",
    the weighted sum of Schulman's k3 of the new policy from the old, and "weight", the sum of the weights. No host
    synchronisation.

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
            "approx_kl": ((ratio - 1 - torch.where(kept, log_ratio, 0)) * weights).sum(),
            "weight": weights.sum(),
        }
    return -(surrogate * weights).sum(), stats
