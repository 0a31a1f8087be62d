"""Log-probabilities of tokens and of whole reveal steps: one function serves sampling and training."""

import torch
import torch.nn.functional as F
from torch import Tensor


def guided(cond_logits: Tensor, uncond_logits: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance, u + g (c - u): logits [..., V] twice -> float32 [..., V].

    Guidance 1 is the conditional network, 0 the unconditional one (Ho and Salimans, arXiv 2207.12598). A rollout
    and its training must use the same guidance: the ratio compares guided distributions.
    """
    uncond = uncond_logits.float()
    return uncond + guidance * (cond_logits.float() - uncond)


def log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability in nats of each token: logits float [..., V], tokens int64 [...] -> float32 [...]."""
    # log_softmax is one pass over the codebook, logsumexp four
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def first_past(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first item at which the running sum of the weights passes the target, and what the items before it left.

    weights float32 [..., n], none negative; target float32 [...] -> index int64 [...] and target minus the sum before
    it, float32 [...]. An item of weight 0 is never found, at either end, unless all are 0.
    """
    # items of weight 0 get no share of the line, even where a parallel cumsum is not quite monotone
    running = weights.cumsum(-1).masked_fill(weights == 0, 0)
    total = running.amax(-1)
    # below the total even where rounding puts it there: some item is always found
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    index = (running > target[..., None]).byte().argmax(-1)
    before = (running - weights).gather(-1, index[..., None]).squeeze(-1)
    return index, (target - before).clamp(min=0)


def sample_tokens(logits: Tensor, uniform: Tensor, *, block: int = 32) -> tuple[Tensor, Tensor]:
    """Draw a token at every position by inverting the distribution function, without host synchronisation.

    logits [..., V] and uniform float32 [...] in [0, 1] -> tokens int64 [...] and their log-probabilities float32
    [...], by the same `log_probs` that training uses. A code of probability 0 is never drawn, at either end. The code
    is sought in two levels, the `block` codes that hold it first: a running sum over all codes would cost as much as
    the head of a small network.
    """
    probs = logits.float().softmax(-1)
    if short := -probs.shape[-1] % block:
        probs = F.pad(probs, (0, short))
    blocks = probs.view(*probs.shape[:-1], -1, block)
    sums = blocks.sum(-1)
    which, left = first_past(sums, uniform * sums.sum(-1))
    found = blocks.gather(-2, which[..., None, None].expand(*which.shape, 1, block)).squeeze(-2)
    tokens = which * block + first_past(found, left)[0]
    return tokens, log_probs(logits, tokens)


def plackett_luce(scores: Tensor, rank: Tensor, candidates: Tensor, revealed: Tensor) -> Tensor:
    """Log-probability that Gumbel-top-k on `scores` reveals exactly the `revealed` positions in the order `rank`.

    scores float [..., L]; rank int64 [..., L], 0 for the first (read at revealed positions only); candidates and
    revealed bool [..., L], revealed within candidates -> float32 [...]. Each revealed position is a softmax choice
    among the candidates not yet revealed (Plackett-Luce; Kool et al., arXiv 1903.06059). The order within the
    revealed set is part of the event. Nothing revealed gives 0.
    """
    length = scores.shape[-1]
    by_rank = rank.masked_fill(~revealed, length).argsort(dim=-1, stable=True)
    # finite in place of -inf: no infinity is subtracted from another below
    ordered = scores.float().masked_fill(~candidates, -1e30).gather(-1, by_rank)
    remaining = ordered.flip(-1).logcumsumexp(-1).flip(-1)
    return torch.where(revealed.gather(-1, by_rank), ordered - remaining, 0).sum(-1)


def step_log_prob(
    log_probs: Tensor,
    rank: Tensor,
    masked: Tensor,
    kept: Tensor,
    temperature: Tensor,
    *,
    order: str = "confidence",
) -> tuple[Tensor, Tensor]:
    """Exact log-probability of one step, the choice of positions included, and its number of terms.

    log_probs float32 [..., L] of the tokens DRAWN at this step, those that were discarded again included; rank int64
    [..., L] of the reveal order; masked (before the step) and kept (by it) bool [..., L]; temperature float [...] of
    the reveal order -> (float32 [...] in nats, int64 [...]).

    order "confidence": the sum of log p over all masked positions, plus the Plackett-Luce order of log p / T. That
    order has probability 1 where the step keeps all that is masked, as a remasking step does. With T = 0 and positions
    left masked the order is deterministic, and the likelihood has no gradient through it: training refuses that.
    order "random": the sum of log p over the kept positions minus log C(n, k), k of n masked; what was drawn and
    discarded plays no part. order "halton": that sum alone, as a fixed order has probability 1. A step that finds
    nothing masked (a finished sample) gives 0 and 0 terms. ValueError for another order.
    """
    n, k = masked.sum(-1), kept.sum(-1)
    if order == "random":
        subsets = torch.lgamma(n + 1.0) - torch.lgamma(k + 1.0) - torch.lgamma(n - k + 1.0)
        return torch.where(kept, log_probs, 0).sum(-1) - subsets, k
    if order == "halton":
        return torch.where(kept, log_probs, 0).sum(-1), k
    if order != "confidence":
        raise ValueError(f"`order` must be confidence, random or halton, got {order!r}")
    chosen = (k < n) & (temperature > 0)
    scores = log_probs / torch.where(chosen, temperature, 1)[..., None]
    choice = torch.where(chosen, plackett_luce(scores, rank, masked, kept), 0)
    return torch.where(masked, log_probs, 0).sum(-1) + choice, n + torch.where(chosen, k, 0)
