"""Importance ratios: what an event is, a token, a step or a sample, and how much more likely it has become.

Each likelihood is a function of new and old log-probabilities float32 [P] of the drawn tokens at positions of a
trajectory, and gives `Events`. An event counts for as many tokens as it has terms, so that at ratio 1 the gradient of
the loss is that of the log-likelihood.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from speedrl.method.likelihoods import step_log_prob
from speedrl.method.sampling import Trajectory
from speedrl.method.scoring import Positions


class Events(NamedTuple):
    """E events whose ratios the loss clips."""

    log_ratio: Tensor  # float32 [E], log of new over old probability
    sample: Tensor  # int64 [E]
    tokens: Tensor  # float32 [E], how many tokens the event counts for


Likelihood = Callable[[Tensor, Tensor, Trajectory, Positions], Events]


def last_draws(trajectory: Trajectory) -> Tensor:
    """Where the token that a step set is that of the finished sample: bool [B, S, L], one step for each position."""
    kept = trajectory.kept
    return kept & (kept.flip(1).cumsum(1).flip(1) == 1)


def token_events(new: Tensor, old: Tensor, trajectory: Trajectory, at: Positions) -> Events:
    """Each token of the finished sample by itself (PPO, GRPO; the paper's).

    Tokens that a remasking step drew again are not in the image that was rewarded, and count for nothing.
    """
    return Events(new - old, at.place[0], last_draws(trajectory)[at.place].float())


def sequence_events(new: Tensor, old: Tensor, trajectory: Trajectory, at: Positions) -> Events:
    """Each sample, by the mean difference of its tokens (GSPO, arXiv 2507.18071)."""
    each = token_events(new, old, trajectory, at)
    zeros = torch.zeros(len(trajectory), device=new.device)
    number = zeros.index_add(0, each.sample, each.tokens)
    mean = zeros.index_add(0, each.sample, each.log_ratio * each.tokens) / number.clamp(min=1)
    return Events(mean, torch.arange(len(trajectory), device=new.device), number)


def exact_events(new: Tensor, old: Tensor, trajectory: Trajectory, at: Positions) -> Events:
    """Each step, by the difference of its exact log-probability over its number of terms (`step_log_prob`).

    So clipping binds alike in steps of few and of many tokens.
    """
    where = (at.sample, at.step)
    fixed = (trajectory.rank[where], trajectory.masked[where], trajectory.kept[where], trajectory.temperature[where])

    def of(token: Tensor) -> tuple[Tensor, Tensor]:
        rows = trajectory.log_probs[where].index_put((at.row, at.position), token)  # [R, L]
        return step_log_prob(rows, *fixed, order=trajectory.order)

    value, terms = of(new)
    return Events((value - of(old)[0]) / terms.clamp(min=1), at.sample, terms.float())


LIKELIHOODS: dict[str, Likelihood] = {"token": token_events, "sequence": sequence_events, "exact": exact_events}


def needs_all_drawn(likelihood: Likelihood, order: str) -> bool:
    """Whether a likelihood scores the tokens that were drawn and discarded, beside those that were kept."""
    return likelihood is exact_events and order == "confidence"
