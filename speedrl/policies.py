"""The policy of a generator: logits and log-probabilities of tokens, given prompts, states and a guidance scale."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from speedrl.method.divergences import kl as divergence
from speedrl.method.likelihoods import guided, log_probs
from speedrl.method.losses import expected_gain
from speedrl.method.sampling import Noise, Trajectory
from speedrl.models.generator import Generator, Prompts, cat_prompts, encode_prompts, index_prompts, repeat_prompts


@dataclasses.dataclass(frozen=True)
class Policy:
    """A transformer with what conditions it, of B samples. `policy[index]` selects samples; `rollout` calls it."""

    transformer: Any  # MeissonicTransformer, AmusedTransformer, or one without its adapter
    prompts: Prompts  # of B samples
    empty: Prompts  # of 1, the negative prompt
    guidance: float  # classifier-free guidance scale; 1 is the conditional network alone
    grid: tuple[int, int]

    def __call__(self, tokens: Tensor, timestep: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
        """Guided logits [n, K, codes]: tokens int64 [n, L], timestep [n], samples int64 [n], positions int64 [n, K].

        One call of the network: on [empty, prompts] with guidance, twice the rows; on the prompts alone at 1.
        """
        features = self.features(tokens, timestep, samples)
        at = positions[..., None].expand(-1, -1, features.shape[-1])
        return self.logits(torch.stack([part.gather(1, at) for part in features], 2))

    def features(self, tokens: Tensor, timestep: Tensor, samples: Tensor) -> Tensor:
        """What the head reads: [T, n, L, C], T = 1 at guidance 1, else 2, the negative prompt's first."""
        times = 1 if self.guidance == 1 else 2
        prompts = index_prompts(self.prompts, samples)
        prompts = prompts if times == 1 else cat_prompts(repeat_prompts(self.empty, len(samples)), prompts)
        rows = tokens.repeat(times, 1).unflatten(1, self.grid)
        return self.transformer.features(rows, timestep.repeat(times), *prompts).unflatten(0, (times, -1))

    def logits(self, features: Tensor) -> Tensor:
        """Guided logits [..., codes] of features [..., T, C]."""
        found = self.transformer.head(features)
        if self.guidance == 1:
            return found.squeeze(-2)
        return guided(found[..., 1, :], found[..., 0, :], self.guidance)

    def __getitem__(self, index: Tensor | slice) -> "Policy":
        """The policy of the samples at `index`, int64 [n] or a slice."""
        return dataclasses.replace(self, prompts=index_prompts(self.prompts, index))


def make_policy(generator: Generator, prompts: list[str], *, guidance: float | None = None) -> Policy:
    """The policy of a generator for B prompts; guidance None is the generator's own."""
    guidance = generator.guidance if guidance is None else guidance
    encoded, empty = encode_prompts(generator, prompts), encode_prompts(generator, [generator.negative])
    return Policy(generator.transformer, encoded, empty, guidance, generator.grid)


def from_random(
    policy: Callable[..., Tensor], noise: Noise, *, share: float, mask_id: int, codes: int
) -> Callable[..., Tensor]:
    """A policy that sees a `share` of random tokens in the place of masks where all is masked; `noise` of [B, L] each.

    So one-step generators are distilled (Di[M]O, arXiv 2503.15457): without it, all that could tell the images of a
    prompt apart is which token each position draws, and they draw independently.
    """
    few = round(share * noise.gumbel.shape[-1])
    random = noise.gumbel.argsort(-1).argsort(-1) < few
    beginning = torch.where(random, (noise.uniform * codes).long(), mask_id)

    def started(tokens: Tensor, timestep: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
        nothing_known = (tokens == mask_id).all(-1, keepdim=True)
        return policy(torch.where(nothing_known, beginning[samples], tokens), timestep, samples, positions)

    return started


class Rows(NamedTuple):
    """States to score, one row for each sample and step: R rows, P positions in one list, none padded."""

    sample: Tensor  # int64 [R], which sample of the trajectory
    step: Tensor  # int64 [R]
    row: Tensor  # int64 [P], the row of each position, rising
    position: Tensor  # int64 [P], 0 .. L - 1


def rows(trajectory: Trajectory, trained: Tensor, *, mask_id: int, all_drawn: bool = False) -> Rows:
    """The steps `trained`, bool [B, S], at the positions that they set; with `all_drawn` at all that they drew."""
    sample, step = trained.nonzero(as_tuple=True)
    at = trajectory.states[sample, step] == mask_id if all_drawn else trajectory.kept[sample, step]
    return Rows(sample, step, *at.nonzero(as_tuple=True))


def score_logits(
    logits: Tensor, reference_logits: Tensor | None, tokens: Tensor, scale: Tensor, *, kl: str
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens and the divergence from the reference, both by the logits that sampled.

    logits and reference_logits [P, V], tokens int64 [P], scale float32 [P] on both -> float32 [P] twice, the second 0
    without a reference. Fit for torch.compile.
    """
    logits = logits.float() * scale[:, None]
    token = log_probs(logits, tokens)
    if reference_logits is None:
        return token, torch.zeros_like(token)
    return token, divergence(logits, reference_logits.float() * scale[:, None], tokens, kind=kl)


def score_rows(
    policy: Policy,
    reference: Policy | None,
    trajectory: Trajectory,
    part: Rows,
    *,
    kl: str = "none",
    slopes: Tensor | None = None,
    codes: Tensor | None = None,
    at_once: int = 2**24,
    score: Callable[..., tuple[Tensor, Tensor]] = score_logits,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the drawn tokens, divergences, and expected gains at the P positions of `part`: [P] each.

    policy and reference are of the trajectory's samples. The gain is that of `expected_gain` by `slopes` [B, L, C] of
    the `codes` [V, C], 0 without. No more than `at_once` logits exist at a time: past that the head works in chunks of
    positions, and again in the backward pass, as keeping [P, V] would take more memory than all else. The head is a
    small part of the network, so that costs little. `score` may be a compiled `score_logits`.
    """
    sample, place = part.sample[part.row], part.position
    where = (part.sample, part.step)
    state, timestep = trajectory.states[where], trajectory.timestep[where]
    tokens = trajectory.drawn[sample, part.step[part.row], place]
    scale = trajectory.logit_scale[sample, part.step[part.row]]

    def gathered(of: Policy) -> Tensor:
        # stacked, not transposed: of other strides, the head's product would copy its weights for every position
        return torch.stack([features[part.row, place] for features in of.features(state, timestep, part.sample)], 1)

    features, of_reference = gathered(policy), None
    if reference is not None:
        with torch.no_grad():
            of_reference = gathered(reference)
    steep = None if slopes is None else slopes[sample, place]

    def chunk(
        features: Tensor, of_reference: Tensor | None, tokens: Tensor, scale: Tensor, steep: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, reference_logits = policy.logits(features), None
        if reference is not None and of_reference is not None:
            with torch.no_grad():
                reference_logits = reference.logits(of_reference)
        token, away = score(logits, reference_logits, tokens, scale, kl=kl)
        gain = torch.zeros_like(token)
        if steep is not None and codes is not None:
            gain = expected_gain(logits.float() * scale[:, None], steep, codes)
        return token, away, gain

    size = max(1, at_once // (policy.transformer.codes * features.shape[1]))
    given = (features, of_reference, tokens, scale, steep)
    if len(tokens) <= size:
        return chunk(*given)
    parts = zip(*(itertools.repeat(None) if x is None else x.split(size) for x in given), strict=False)
    found = [checkpoint(chunk, *each, use_reentrant=False, preserve_rng_state=False) for each in parts]
    token, away, gain = (torch.cat(each) for each in zip(*found, strict=True))
    return token, away, gain


def token_log_probs(policy: Policy, trajectory: Trajectory, *, mask_id: int) -> Tensor:
    """Log-probabilities of the tokens that each step drew, with a gradient: float32 [B, S, L], 0 where none was drawn.

    Before the first update they are `trajectory.log_probs`.
    """
    every = torch.arange(trajectory.states.shape[1], device=trajectory.steps.device) < trajectory.steps[:, None]
    part = rows(trajectory, every, mask_id=mask_id, all_drawn=True)
    token, _, _ = score_rows(policy, None, trajectory, part)
    place = (part.sample[part.row], part.step[part.row], part.position)
    return torch.zeros_like(trajectory.log_probs).index_put(place, token)
