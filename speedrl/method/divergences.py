"""Estimators of the Kullback-Leibler divergence between the policy and the reference policy."""

import torch
from torch import Tensor

from speedrl.method.likelihoods import log_probs

FULL = 16  # steps from which on the divergence has its whole weight
KINDS = ("ce", "reverse", "k1", "k2", "k3", "none")
SAMPLED = ("k1", "k2", "k3")  # estimated at the drawn tokens


def kl(policy_logits: Tensor, reference_logits: Tensor, tokens: Tensor | None = None, *, kind: str = "ce") -> Tensor:
    """Divergence in nats at each position: logits [..., V] twice, tokens int64 [...] -> float32 [...].

    The reference gets no gradient. With pi the policy, r the reference and x the token, drawn from pi:
    "ce"       KL(r || pi) = CE(r, pi) - H(r) over the whole codebook: k3's expected gradient without its noise
    "reverse"  KL(pi || r) over the whole codebook
    "k1"       log pi(x) - log r(x): expected value KL(pi || r), expected gradient 0, so of use as a metric only
    "k2"       (log pi(x) - log r(x))^2 / 2: biased value, expected gradient that of KL(pi || r)
    "k3"       r(x) / pi(x) - 1 + log pi(x) - log r(x): expected value KL(pi || r), never negative, but the expected
               gradient of KL(r || pi)
    "none"     0
    k1 to k3 are Schulman's (joschu.net/blog/kl-approx.html). They need `tokens` that were drawn by these policy logits:
    score every drawn token, as those that were kept are a selection. ValueError for another kind.

    >>> kl(torch.zeros(1, 4), torch.zeros(1, 4)).item()
    0.0
    """
    reference_logits = reference_logits.detach()
    match kind:
        case "none":
            return torch.zeros(policy_logits.shape[:-1], device=policy_logits.device)
        case "ce":
            return _expected_log_ratio(reference_logits, policy_logits)
        case "reverse":
            return _expected_log_ratio(policy_logits, reference_logits)
        case "k1" | "k2" | "k3":
            if tokens is None:
                raise ValueError(f"the divergence estimator {kind!r} needs the sampled tokens")
            difference = log_probs(policy_logits, tokens) - log_probs(reference_logits, tokens)
            if kind == "k1":
                return difference
            return difference**2 / 2 if kind == "k2" else torch.expm1(-difference) + difference
    raise ValueError(f"--kl must be {', '.join(KINDS)}, got {kind!r}")


def count_weights(steps: Tensor, *, falloff: float = 2.0) -> Tensor:
    """Weight of the divergence for samples of so many steps: int64 [B] -> float32 [B], (steps / 16)^2 and at most 1.

    The reference is right about each token given those that are known. In many steps that is nearly all; in few, which
    draw many tokens independently, it is wrong about all of them together, and the best policy is far from it.
    """
    return (steps / FULL).clamp(max=1) ** falloff


def _expected_log_ratio(logits: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(other)) over the last dimension, float32."""
    log_p = logits.float().log_softmax(-1)
    difference = log_p - other.float().log_softmax(-1)
    # a code that logits exclude contributes 0, not 0 times infinity
    return (log_p.exp() * difference.masked_fill(log_p == -torch.inf, 0)).sum(-1)
