"""Estimators of the Kullback-Leibler divergence between the policy and the reference policy.

Each is a function of the policy's and the reference's logits [..., V] and the drawn tokens int64 [...], and gives
float32 [...] in nats. The reference gets no gradient. With pi the policy, r the reference, x the token drawn from pi.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from speedrl.method.likelihoods import log_probs

Divergence = Callable[[Tensor, Tensor, Tensor], Tensor]
FULL = 16  # steps from which on the divergence has its whole weight
TEACHER_FLOOR = -12.0  # of a teacher's log-probabilities: what it excludes does not outweigh all else


def ce_kl(logits: Tensor, reference: Tensor, tokens: Tensor | None = None) -> Tensor:
    """KL(r || pi) = CE(r, pi) - H(r) over the whole codebook: k3's expected gradient without its noise.

    >>> ce_kl(torch.zeros(1, 4), torch.zeros(1, 4)).item()
    0.0
    """
    return expected_log_ratio(reference.detach(), logits)


def reverse_kl(logits: Tensor, reference: Tensor, tokens: Tensor | None = None) -> Tensor:
    """KL(pi || r) over the whole codebook."""
    return expected_log_ratio(logits, reference.detach())


def k2(logits: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    """(log pi(x) - log r(x))^2 / 2: a biased value, with the expected gradient of KL(pi || r).

    k2 and k3 are Schulman's (joschu.net/blog/kl-approx.html); his k1 has an expected gradient of 0.
    """
    return (log_probs(logits, tokens) - log_probs(reference.detach(), tokens)) ** 2 / 2


def k3(logits: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    """r(x) / pi(x) - 1 + log pi(x) - log r(x): expected value KL(pi || r), never negative, but the expected gradient of
    KL(r || pi)."""
    difference = log_probs(logits, tokens) - log_probs(reference.detach(), tokens)
    return torch.expm1(-difference) + difference


DIVERGENCES: dict[str, Divergence] = {"ce": ce_kl, "reverse": reverse_kl, "k2": k2, "k3": k3}
SAMPLED = (k2, k3)  # estimates at the drawn tokens: score every drawn one, as those that were kept are a selection


def kl(logits: Tensor, reference: Tensor, tokens: Tensor | None = None, *, kind: str = "ce") -> Tensor:
    """The divergence `kind` of DIVERGENCES. ValueError for another kind, and for k2 and k3 without tokens."""
    if kind not in DIVERGENCES:
        raise ValueError(f"`kind` must be {', '.join(DIVERGENCES)}, got {kind!r}")
    if tokens is None:
        if DIVERGENCES[kind] in SAMPLED:
            raise ValueError(f"the divergence estimator {kind!r} needs the sampled tokens")
        tokens = torch.empty(0)
    return DIVERGENCES[kind](logits, reference, tokens)


def hindsight_divergence(
    logits: Tensor, reference: Tensor, teacher: Tensor, noise: Tensor | None, unknown: Tensor
) -> Tensor:
    """How far the policy is from what the reference says with hindsight: [P, V] each, unknown bool [P] -> float32 [P].

    sum_k w(k) (log pi(k) - log q(k)), q the teacher, which sees a part of the finished image. w is pi, and the sum is
    KL(pi || q); where all positions drew by the same Gumbel noise [P, V], w is pi given that noise, softmax(log pi +
    noise), so that images which differ by their noise are not drawn to one mode. Where the state knows nothing yet,
    KL(r || pi) from the reference of that state: what is still open stays open.
    """
    log_p, log_q = logits.float().log_softmax(-1), teacher.detach().float().log_softmax(-1).clamp(min=TEACHER_FLOOR)
    weights = log_p.exp() if noise is None else (log_p + noise).softmax(-1)
    return torch.where(unknown, ce_kl(logits, reference), (weights * (log_p - log_q)).sum(-1))


def count_weights(steps: Tensor, *, falloff: float = 2.0) -> Tensor:
    """Weight of the divergence for samples of so many steps: int64 [B] -> float32 [B], (steps / 16)^2 and at most 1.

    The reference is right about each token given those that are known. In many steps that is nearly all; in few, which
    draw many tokens independently, it is wrong about all of them together, and the best policy is far from it.
    """
    return (steps / FULL).clamp(max=1) ** falloff


def expected_log_ratio(logits: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(other)) over the last dimension, float32."""
    log_p = logits.float().log_softmax(-1)
    difference = log_p - other.float().log_softmax(-1)
    # a code that logits exclude contributes 0, not 0 times infinity
    return (log_p.exp() * difference.masked_fill(log_p == -torch.inf, 0)).sum(-1)
