"""The dense reward: how well each token fits the rest of the finished image, by the reference policy.

On-policy distillation with hindsight. The teacher is the frozen reference, which sees a part of the policy's own
finished image; the policy is moved towards what it says of the hidden tokens, at the states that the rollout visited.
The expectation over the codes is in closed form, so the draw of a token adds no noise. Closest: d-OPSD (arXiv
2606.18195) for text, COPSD (ACL Findings 2026.1344), FPD (arXiv 2605.21484). New here: masked images, a guided
reference, fewer steps.
"""

import torch
from torch import Tensor

from speedrl.method.sampling import Trajectory
from speedrl.method.scoring import Positions, Scored


def hide(tokens: Tensor, uniform: Tensor, *, share: float, mask_id: int) -> Tensor:
    """Finished samples int64 [B, L] with a share of the tokens masked, those of the smallest uniform float [B, L]."""
    count = max(1, round(share * tokens.shape[1]))
    return tokens.masked_fill(uniform.argsort(-1).argsort(-1) < count, mask_id)


def teacher_features(reference: Scored, finished: Tensor, *, mask_id: int, steps: int = 64) -> Tensor:
    """What the reference's head reads of finished samples int64 [B, L] with hidden tokens: [T, B, L, C], no gradient.

    The timestep is that at which a cosine schedule of so many steps has as much masked: what the reference expects.
    """
    share = (finished == mask_id).float().mean(1)
    timestep = (steps - 1 - (share.acos() * 2 / torch.pi * steps).floor()).clamp(min=0).long()
    with torch.no_grad():
        return reference.features(finished, timestep, torch.arange(len(finished), device=finished.device))


def hindsight_weights(trajectory: Trajectory, at: Positions, finished: Tensor) -> Tensor:
    """Weight of each of P positions in the hindsight divergence: float32 [P].

    1 over the hidden share where the step set a token that was hidden in finished int64 [B, L] (`hide`), else 0: one
    that is not hidden is known to the teacher, and teaches nothing. 1 in states where nothing is known yet.
    """
    sample, _, position = at.place
    unknown = trajectory.masked[at.sample, at.step].all(-1)[at.row]
    hidden = (finished == trajectory.mask_id).float()
    weights = trajectory.kept[at.place] * (hidden / hidden.mean(1, keepdim=True))[sample, position]
    return torch.where(unknown, 1.0, weights)
