"""What one update computes of a rollout: its states again, the scores of their tokens, and the loss."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speedrl.method.critic import expected_gain
from speedrl.method.divergences import count_weights
from speedrl.method.divergences import kl as divergence
from speedrl.method.likelihoods import exact_log_prob, guided, log_probs, log_ratio
from speedrl.method.losses import clipped_loss, normalise
from speedrl.method.sampling import Rollout, state
from speedrl.models.checkpoint import Prompts, join, repeat, take
from speedrl.pace import Pace, expected
from speedrl.run.distributed import sum_gradients


class Rows(NamedTuple):
    """States of a micro-batch, one row for each sample and step that trains, and the places to score. R rows, P places.

    The places of all rows stand in one list: rows reveal different numbers of tokens, and none is padded.
    """

    sample: Tensor  # int64 [R], which sample of the micro-batch
    step: Tensor  # int64 [R]
    tokens: Tensor  # int64 [R, L], what the policy saw
    timestep: Tensor  # int64 [R]
    row: Tensor  # int64 [P], the row of each place, rising
    place: Tensor  # int64 [P], 0 .. L - 1
    targets: Tensor  # int64 [P], the token drawn there


def rows(batch: Rollout, keep: Tensor, *, mask_id: int, every_place: bool = False) -> Rows:
    """Replays the states of the steps in `keep`, bool [B, S]; with `every_place` for all places, not the revealed."""
    sample, step = keep.nonzero(as_tuple=True)
    part = batch._replace(tokens=batch.tokens[sample], reveal_step=batch.reveal_step[sample])
    revealed = part.reveal_step == step[:, None]
    row, place = (torch.ones_like(revealed) if every_place else revealed).nonzero(as_tuple=True)
    drawn = batch.drawn[sample, step] if every_place else part.tokens
    seen, countdown = state(part, step, mask_id=mask_id), batch.countdown[sample, step]
    return Rows(sample, step, seen, countdown, row, place, drawn[row, place])


def trained_steps(steps: Tensor, count: int | None, generator: torch.Generator) -> Tensor:
    """Which steps of each sample train: bool [B, S], `count` of its N at random, all where count is None."""
    exists = torch.arange(int(steps.max())) < steps.cpu()[:, None]
    if count is None:
        return exists.to(steps.device)
    score = torch.rand(exists.shape, generator=generator).masked_fill(~exists, -1)
    return (exists & (score.argsort(dim=-1, descending=True).argsort(dim=-1) < count)).to(steps.device)


def token_weights(batch: Rollout, which: Tensor, keep: Tensor) -> Tensor:
    """What each token weighs in the loss: float32 [B, L], 0 where its step does not train or its sample is left out.

    which bool [B, S], the steps that train; keep float32 [B], 0 or 1. Where K of a sample's N steps train, their tokens
    weigh N / K. Divided by the number of ALL kept samples' tokens, which does not depend on the steps drawn, the
    gradient is in expectation that of all steps.
    """
    scale = batch.steps / which.sum(-1)
    return which.gather(1, batch.reveal_step) * (keep * scale)[:, None]


def row_features(
    transformer: nn.Module, part: Rows, prompts: Prompts, empty: Prompts, *, guidance: float, grid: tuple[int, int]
) -> Tensor:
    """What the heads read of the rows: [1, R, L, C] without guidance, else [2, R, L, C], the empty prompt's first."""
    times, prompts = (1, prompts) if guidance == 1 else (2, join(empty, prompts))
    tokens = part.tokens.repeat(times, 1).unflatten(1, grid)
    return transformer.features(tokens, part.timestep.repeat(times), *prompts).unflatten(0, (times, -1))


def at_places(features: Tensor, part: Rows) -> Tensor:
    """`row_features` at the places alone: [P, 1, C] without guidance, else [P, 2, C]."""
    # stacked, not transposed: of other strides, the head's product would copy its weights for every place
    return torch.stack([part_of[part.row, part.place] for part_of in features], 1)


def guided_head(transformer: nn.Module, features: Tensor, guidance: float) -> Tensor:
    """Guided logits of features `at_places`, as the policy's: float [P, V]."""
    found = transformer.head(features)
    return found[:, 0] if guidance == 1 else guided(found[:, 1], found[:, 0], guidance)


def scores(
    transformer: nn.Module,
    reference: nn.Module | None,
    features: Tensor,
    of_reference: Tensor | None,
    targets: Tensor,
    *,
    guidance: float,
    reference_guidance: float,
    kl: str,
    sharpness: Tensor | None = None,
    slopes: Tensor | None = None,
    codes: Tensor | None = None,
    at_once: int = 2**24,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the targets int64 [P] the log-probability, the divergence there, 0 without a reference, and what the policy is
    to gain there by `slopes` [P, C] of the `codes` [V, C], 0 without: float32 [P] each.

    features and of_reference as of `at_places`, each at its guidance. `sharpness` [P] is the factor that the policy's
    logits had in the rollout; the divergence is of the networks, without it. No more than `at_once` of its logits
    are there at a time: past that the head works in chunks of places, and again in the backward pass, as keeping [P, V]
    would take more memory than all else. The head is a small part of the network, so that costs little.
    """

    def score(
        features: Tensor, of_reference: Tensor | None, targets: Tensor, sharpness: Tensor | None, slopes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = guided_head(transformer, features, guidance)
        sharp = logits if sharpness is None else logits.float() * sharpness[:, None]
        token = log_probs(sharp, targets)
        gain = torch.zeros_like(token) if slopes is None else expected_gain(sharp, slopes, codes)
        if reference is None:
            return token, torch.zeros_like(token), gain
        with torch.no_grad():
            reference_logits = guided_head(reference, of_reference, reference_guidance)
        return token, divergence(logits, reference_logits, targets, kind=kl), gain

    chunk = max(1, at_once // (transformer.codes * features.shape[1]))
    if len(targets) <= chunk:
        return score(features, of_reference, targets, sharpness, slopes)
    given = (features, of_reference, targets, sharpness, slopes)
    parts = zip(*(itertools.repeat(None) if x is None else x.split(chunk) for x in given), strict=False)
    found = [checkpoint(score, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


def pace_gradient(pace: Pace, known: Tensor, rewards: Tensor, *, size: int) -> None:
    """Adds to the pace's parameters the gradient of what the pictures are to expect of its decisions (`expected`).

    known [b, K, C] and rewards [b, K + 1] of this rank's pictures at each place to stop; `size`, those of all ranks.
    """
    (-expected(pace(known), rewards).sum() / size).backward()


def micro_batch_loss(
    transformer: nn.Module,
    reference: nn.Module | None,
    batch: Rollout,
    part: Rows,
    prompts: Prompts,
    empty: Prompts,
    advantages: Tensor,
    weights: Tensor,
    *,
    grid: tuple[int, int],
    guidance: float,
    reference_guidance: float,
    order: str,
    likelihood: str,
    clip_range: float,
    kl: str,
    kl_weight: float,
    kl_falloff: float = 0.0,
    slopes: Tensor | None = None,
    codes: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped loss plus weighted KL of some samples, summed over their trained tokens; see `clipped_loss`.

    batch: m samples; part: their rows; prompts and empty: of each row; advantages [m, S], which may differ between the
    steps with likelihood "token"; weights [m, L], 0 for tokens that do not train. The caller divides by the weight of
    the whole batch. With `kl_falloff` samples of few steps have less of kl_weight (`count_weights`).
    With `slopes` [m, L, C] of the `codes` [V, C] the tokens gain as `expected_gain` says as well.
    """
    features = row_features(transformer, part, prompts, empty, guidance=guidance, grid=grid)
    features, of_reference = at_places(features, part), None
    if reference is not None:
        with torch.no_grad():
            of_reference = row_features(reference, part, prompts, empty, guidance=reference_guidance, grid=grid)
            of_reference = at_places(of_reference, part)
    token, away, gain = scores(
        transformer, reference, features, of_reference, part.targets, guidance=guidance,
        reference_guidance=reference_guidance, kl=kl, codes=codes,
        sharpness=None if batch.sharpness is None else batch.sharpness[part.sample, part.step][part.row],
        slopes=None if slopes is None else slopes[part.sample[part.row], part.place],
    )  # fmt: skip
    where = part.sample[part.row] * weights.shape[1] + part.place  # [P], in the flat micro-batch
    trained = weights.flatten()[where]
    if likelihood == "exact":  # then the places are all of every row
        revealed = batch.reveal_step[part.sample] == part.step[:, None]
        masked = part.tokens != batch.tokens[part.sample]
        rank, temperature = batch.rank[part.sample, part.step], batch.temperature[part.sample, part.step]
        value, terms = exact_log_prob(token.view_as(rank), rank, masked, revealed, temperature, order=order)
        new, old = (torch.zeros_like(advantages[:, 0]).index_add(0, part.sample, v)
                    for v in (value, batch.exact[part.sample, part.step]))  # fmt: skip
        count = torch.zeros_like(batch.steps).index_add(0, part.sample, terms)
        ratio = log_ratio(new, old, level="exact", terms=count)
        trained = trained * revealed.flatten()
    else:
        old = batch.log_probs
        new = old.flatten().index_put((where,), token).view_as(old)
        ratio = log_ratio(new, old, level=likelihood, weights=weights)
    of_tokens = advantages.gather(1, batch.reveal_step) if likelihood == "token" else advantages[:, :1]
    loss, stats = clipped_loss(ratio, of_tokens, weights, clip_range=clip_range)
    loss = loss - (gain * trained).sum()
    away = away * trained
    held = away * count_weights(batch.steps, falloff=kl_falloff)[part.sample[part.row]]
    return loss + kl_weight * held.sum(), stats | {"kl": away.detach().sum()}


def accumulate(totals: dict[str, float], stats: dict[str, Tensor]) -> None:
    """Adds a micro-batch's statistics to `totals`: means by weight become sums, to be divided by "kept" at the end."""
    kept = stats["kept"].item()
    for name, value in stats.items():
        value = value.item()
        if name == "ratio_max":
            totals[name] = max(totals.get(name, 0.0), value)
        else:
            totals[name] = totals.get(name, 0.0) + (value if name in ("kept", "kl") else value * kept)


def gradients(
    transformer: nn.Module,
    reference: nn.Module | None,
    batch: Rollout,
    which: Tensor,
    prompt: Prompts,
    empty: Prompts,
    advantages: Tensor,
    weights: Tensor,
    kept: Tensor,
    *,
    micro_batch: int,
    mask_id: int,
    autocast: torch.autocast,
    slopes: Tensor | None = None,
    **how: Any,
) -> dict[str, float]:
    """Adds the gradient of B samples to the parameters', `micro_batch` samples at a time, whatever their number.

    which bool [B, S], the steps that train; prompt of B; advantages [B, S]; weights [B, L]; kept, the weight of all
    samples of all ranks; slopes [B, L, C] and `how` as of `micro_batch_loss`. Returns its statistics, summed.
    """
    totals: dict[str, float] = {}
    for index in torch.arange(len(weights), device=weights.device).split(micro_batch):
        part = Rollout(*(None if field is None else field[index] for field in batch))
        states = rows(part, which[index], mask_id=mask_id, every_place=how["likelihood"] == "exact")
        with autocast:
            loss, stats = micro_batch_loss(
                transformer, reference, part, states, take(prompt, index[states.sample]),
                repeat(empty, len(states.sample)), advantages[index], weights[index],
                slopes=None if slopes is None else slopes[index], **how,
            )  # fmt: skip
        loss = loss * (1 + 0 * loss.detach())  # one that is not finite has a gradient that is not, whatever made it so
        normalise(loss, kept).backward()
        accumulate(totals, stats)
    return totals


def fitting(
    run: Callable[[int], Any], size: int, *, undo: Callable[[], None] = lambda: None, halve: bool = True
) -> tuple[Any, int]:
    """run(size), with half the size again each time that the device's memory runs out, and the size that fitted.

    `undo` takes back what a failed run has done. OutOfMemoryError at size 1, or at once where `halve` is off: ranks
    that wait for each other within a micro-batch cannot differ in their number.
    """
    while True:
        try:
            return run(size), size
        except torch.OutOfMemoryError:
            undo()
            if size == 1 or not halve:
                raise
        size = (size + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def descend(optimizer: torch.optim.Optimizer, *, clip_grad: float, sharded: bool = False) -> Tensor:
    """Sums the gradients of all ranks, clips those of each group of parameters, takes a step if they are finite; the
    first group's norm before it, a scalar, or NaN where another's is not finite."""
    groups = [group["params"] for group in optimizer.param_groups]
    sum_gradients([p for group in groups for p in group])
    norms = [nn.utils.clip_grad_norm_(group, clip_grad) for group in groups]
    norm, *others = (norm.full_tensor() if sharded else norm for norm in norms)
    norm = norm + 0 * sum(others)
    if norm.isfinite():
        optimizer.step()
    optimizer.zero_grad()
    return norm


@torch.no_grad()
def follow(average: Mapping[str, Tensor], learned: Mapping[str, Tensor], *, decay: float, updates: int) -> None:
    """Moves the exponential moving average of the weights towards them, in place; faster over the first updates, so
    that where it started does not count for long."""
    decay = min(decay, (1 + updates) / (10 + updates))
    for name, value in average.items():
        value.lerp_(learned[name].detach(), 1 - decay)
