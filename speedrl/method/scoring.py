"""What a policy says at the states that a rollout visited: logits, log-probabilities and divergences.

Only the positions that matter are scored, in one list without padding, and no more than a bounded number of logits
exists at a time.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from speedrl.method.divergences import Divergence, hindsight_divergence
from speedrl.method.likelihoods import log_probs
from speedrl.method.sampling import Trajectory

AT_ONCE = 2**24  # logits


class Scored(Protocol):
    """What scoring needs of a policy; `generation.Policy` is one."""

    @property
    def codes(self) -> int:
        """Logits are over tokens 0 .. codes - 1."""

    def features(self, tokens: Tensor, timestep: Tensor, samples: Tensor, /) -> Tensor:
        """What the head reads: states int64 [n, L] of the samples int64 [n] -> [T, n, L, C]."""

    def logits(self, features: Tensor, /) -> Tensor:
        """The head: [P, T, C] -> [P, codes]."""


class Positions(NamedTuple):
    """Positions of P tokens in R visited states, one state for each sample and step."""

    sample: Tensor  # int64 [R], which sample of the trajectory
    step: Tensor  # int64 [R]
    row: Tensor  # int64 [P], the state of each position, rising
    position: Tensor  # int64 [P], 0 .. L - 1

    @property
    def place(self) -> tuple[Tensor, Tensor, Tensor]:
        """Index of the P positions into what a trajectory records, [B, S, L]."""
        return self.sample[self.row], self.step[self.row], self.position


class Scores(NamedTuple):
    """What is said at P positions: float32 [P] each."""

    log_probs: Tensor  # of the drawn tokens
    kl: Tensor  # divergence from the reference policy, 0 without one
    hindsight: Tensor  # as of `hindsight_divergence`, 0 without a teacher


def visited_steps(steps: Tensor) -> Tensor:
    """The steps that each sample takes: step counts int64 [B] -> bool [B, S]."""
    return torch.arange(int(steps.max()), device=steps.device) < steps[:, None]


def trained_steps(steps: Tensor, count: int | None, generator: torch.Generator) -> Tensor:
    """Which steps of each sample train: bool [B, S], `count` of its N at random, all where it has no more or None."""
    visited = visited_steps(steps.cpu())
    if count is None:
        return visited.to(steps.device)
    score = torch.rand(visited.shape, generator=generator).masked_fill(~visited, -1)
    return (visited & (score.argsort(dim=-1, descending=True).argsort(dim=-1) < count)).to(steps.device)


def positions_of(
    trajectory: Trajectory, steps: Tensor | None = None, *, all_drawn: bool = False, all_unknown: bool = False
) -> Positions:
    """The positions that the steps bool [B, S] set; None is every step.

    With `all_drawn` all at which they drew, with `all_unknown` these in states where nothing is known yet.
    """
    sample, step = (visited_steps(trajectory.steps) if steps is None else steps).nonzero(as_tuple=True)
    masked, at = trajectory.masked[sample, step], trajectory.kept[sample, step]
    if all_drawn:
        at = masked
    elif all_unknown:
        at = at | masked.all(-1, keepdim=True)
    return Positions(sample, step, *at.nonzero(as_tuple=True))


def features_at(policy: Scored, trajectory: Trajectory, at: Positions) -> Tensor:
    """What the head reads at the positions: [P, T, C]."""
    where = (at.sample, at.step)
    found = policy.features(trajectory.states[where], trajectory.timestep[where], at.sample)
    # stacked, not transposed: of other strides, the head's product would copy its weights for every position
    return torch.stack([features[at.row, at.position] for features in found], 1)


def token_logits(policy: Scored, trajectory: Trajectory, at: Positions) -> Tensor:
    """The logits that drew the tokens at the positions, the sampler's scale included: float32 [P, V], with a gradient.

    Before the first update their log-softmax at the drawn tokens is `trajectory.log_probs`.
    """
    scale = trajectory.logit_scale[at.place[:2]]
    return policy.logits(features_at(policy, trajectory, at)).float() * scale[:, None]


def token_log_probs(policy: Scored, trajectory: Trajectory) -> Tensor:
    """Log-probabilities of the tokens that each step drew, with a gradient: float32 [B, S, L], 0 where none was drawn.

    Before the first update they are `trajectory.log_probs`.
    """
    at = positions_of(trajectory, all_drawn=True)
    return torch.zeros_like(trajectory.log_probs).index_put(at.place, score(policy, trajectory, at).log_probs)


def score_logits(
    logits: Tensor,
    reference: Tensor | None,
    teacher: Tensor | None,
    noise: Tensor | None,
    tokens: Tensor,
    scale: Tensor,
    unknown: Tensor,
    *,
    kl: Divergence | None,
) -> Scores:
    """Scores of logits [P, V] for drawn tokens int64 [P].

    `scale` float32 [P] is a factor on the logits of policy and reference [P, V], as they sample with it; the teacher's
    are taken as they are. `noise` [P, V] over the codes, that drew the tokens, and `unknown` bool [P], where a state
    knows nothing yet, are for `hindsight_divergence`. Fit for torch.compile.
    """
    logits = logits.float() * scale[:, None]
    found = log_probs(logits, tokens)
    none = torch.zeros_like(found)
    if reference is None:
        return Scores(found, none, none)
    reference = reference.float() * scale[:, None]
    away = none if kl is None else kl(logits, reference, tokens)
    missed = none if teacher is None else hindsight_divergence(logits, reference, teacher, noise, unknown)
    return Scores(found, away, missed)


def score(
    policy: Scored,
    trajectory: Trajectory,
    at: Positions,
    *,
    reference: Scored | None = None,
    kl: Divergence | None = None,
    teacher: Tensor | None = None,
    at_once: int = AT_ONCE,
    score_logits: Callable[..., Scores] = score_logits,
) -> Scores:
    """`score_logits` at the positions, with a gradient for the policy alone.

    policy and reference are of the trajectory's samples. `kl` is a function of `divergences`. `teacher` are features
    [T, B, L, C] of the reference for each sample (`hindsight`). No more than `at_once` logits exist at a time: past
    that the head works in chunks of positions, and again in the backward pass, as keeping [P, V] would take more memory
    than all else. The head is a small part of the network, so that costs little.
    """
    sample, step, position = at.place
    features, of_reference, of_teacher = features_at(policy, trajectory, at), None, None
    with torch.no_grad():
        if reference is not None and (kl is not None or teacher is not None):
            of_reference = features_at(reference, trajectory, at)
        if teacher is not None:
            of_teacher = torch.stack([part[sample, position] for part in teacher], 1)

    def head(of: Scored | None, features: Tensor | None) -> Tensor | None:
        if of is None or features is None:
            return None
        with torch.no_grad():
            return of.logits(features)

    def chunk(features: Tensor, ref: Tensor | None, hindsight: Tensor | None, which: Tensor, *given: Tensor) -> Scores:
        noise = None if trajectory.codes is None or hindsight is None else trajectory.codes[sample[which], step[which]]
        return score_logits(policy.logits(features), head(reference, ref), head(reference, hindsight), noise, *given,
                            kl=kl)

    size = max(1, at_once // (policy.codes * features.shape[1]))
    unknown = trajectory.masked[at.sample, at.step].all(-1)[at.row]
    inputs: tuple[Any, ...] = (features, of_reference, of_teacher, torch.arange(len(position), device=position.device),
                               trajectory.drawn[at.place], trajectory.logit_scale[sample, step], unknown)
    if len(position) <= size:
        return chunk(*inputs)
    parts = zip(*(itertools.repeat(None) if x is None else x.split(size) for x in inputs), strict=False)
    found = [checkpoint(chunk, *each, use_reentrant=False, preserve_rng_state=False) for each in parts]
    return Scores(*(torch.cat(each) for each in zip(*found, strict=True)))


def compiled_score() -> Callable[..., Scores]:
    """`score_logits` compiled as one graph for any number of positions."""
    return torch.compile(score_logits, dynamic=True, fullgraph=True)


def position_weights(trajectory: Trajectory, at: Positions, *, sampled: bool = False) -> Tensor:
    """What each of P positions counts for in a mean over the tokens that were kept: float32 [P].

    1 where the token was kept, else 0. With `sampled`, every drawn position of a state counts alike, and all of them
    together for those that were kept.
    """
    kept = trajectory.kept[at.place].float()
    if not sampled:
        return kept
    number = torch.zeros(2, len(at.sample), device=kept.device)
    number = number.index_add(1, at.row, torch.stack([kept, torch.ones_like(kept)]))
    return (number[0] / number[1].clamp(min=1))[at.row]
