"""Revision: the last steps draw again what was least sure when it was drawn, now that the rest of the picture is there.

Tokens of one step are drawn apart, and those of early steps before most of the picture is known: some do not go with
what came after. In parallel decoding nothing that is revealed ever changes. Here a share of the steps, in place of
revealing less at a time, masks the tokens of least log-probability and draws them anew, fewer each time (as in
remasking samplers of masked diffusion, arXiv 2503.00307). What is drawn in one step lies on the fields of one colour of
a chequerboard, so that each token sees its four neighbours, and no two neighbours are drawn apart again (the parallel
Gibbs sampler of a lattice; Gonzalez et al., AISTATS 2011). Network calls stay the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from speedrl.method.likelihoods import sample_tokens
from speedrl.method.sampling import Rollout


def check_share(share: float) -> float:
    """The share, if it is one of tokens. ValueError outside 0 .. 1."""
    if not 0 <= share <= 1:
        raise ValueError(f"the share of tokens to revise must be 0 to 1, got {share}")
    return share


def split_steps(steps: int, *, share: float, least: int = 6) -> tuple[int, int]:
    """Of so many steps those that reveal and those that revise: a quarter, but two at the least, one of each colour.

    None where the share of tokens is 0, and of fewer than `least`: there every step is needed to reveal.
    """
    revising = max(steps // 4, 2) if share and steps >= least else 0
    return steps - revising, revising


def revised_counts(steps: int, *, length: int, share: float) -> list[int]:
    """Tokens of `length` that each of the revising steps draws again: the first two, one of each colour, the share of
    them together, and each two that follow fewer by as many, so that the last, which nothing follows, change little."""
    pairs = (steps + 1) // 2
    return [round(length * share / 2 * (pairs - step // 2) / pairs) for step in range(steps)]


def chequered(rows: int, columns: int) -> Tensor:
    """The colour 0 or 1 of each place of a grid, int64 [rows * columns]: neighbours have different ones."""
    return ((torch.arange(rows)[:, None] + torch.arange(columns)) % 2).flatten()


@torch.no_grad()
def revise_tokens(
    policy: Callable[..., Tensor],
    finished: Rollout,
    uniform: Tensor,
    counts: list[int],
    *,
    mask_id: int,
    grid: tuple[int, int],
    sharpness: Tensor | None = None,
    sharper: float = 1.5,
) -> Rollout:
    """A finished rollout of B samples with its least sure tokens drawn again, a step of the network for each of counts.

    policy as of `rollout` with `sparse`, and with a summary if `finished` has one; uniform float32 [B, len(counts) or
    more, L], as `Noise`'s; `grid` the rows and columns of the L tokens. The steps draw on the two colours in turn, no
    more than there are places of one. sharpness float32 [B] is a factor on the logits, and `sharper` another: with
    nearly everything seen little is left open. The network is told that it is at its last step. A token's log-
    probability is that of its latest draw, so one that is drawn surely is left alone from then on. Of the rollout
    tokens, log_probs and the summary change, and nothing else: its other fields are of the draws before, so it cannot
    be trained on.
    """
    tokens, sure, summary = finished.tokens.clone(), finished.log_probs.clone(), finished.summary
    samples, colour = torch.arange(len(tokens), device=tokens.device), chequered(*grid)
    fields = [(colour == turn).nonzero().squeeze(-1).to(tokens.device) for turn in (0, 1)]
    last_step = torch.zeros_like(samples)
    sharpness = sharper if sharpness is None else sharper * sharpness[:, None, None]
    for step, count in enumerate(counts):
        field = fields[step % 2]
        places = field[sure[:, field].argsort(dim=-1, stable=True)[:, :count]]
        logits = policy(tokens.scatter(1, places, mask_id), last_step, samples, places)
        if summary is not None:
            logits, summary = logits
        drawn, log_p = sample_tokens(logits.float() * sharpness, uniform[:, step].gather(1, places))
        tokens, sure = tokens.scatter(1, places, drawn), sure.scatter(1, places, log_p)
    return finished._replace(tokens=tokens, log_probs=sure, summary=summary)
