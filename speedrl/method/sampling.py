"""Rollouts: parallel decoding of masked tokens, with all that is needed to replay every state of it."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from speedrl.method.likelihoods import exact_log_prob, sample_tokens
from speedrl.method.schedules import halton_order, masked_counts, seeded, temperatures, timesteps
from speedrl.method.search import Tuning, sharpness
from speedrl.system.platform import can_compile

ORDERS = ("confidence", "random", "halton")


class Rollout(NamedTuple):
    """Finished samples. B samples, L tokens, S = steps.max() steps."""

    tokens: Tensor  # int64 [B, L]
    reveal_step: Tensor  # int64 [B, L], the step 0..N-1 that revealed each token
    steps: Tensor  # int64 [B], the step count N of each sample
    log_probs: Tensor  # float32 [B, L], log p of each token at the step that revealed it
    countdown: Tensor  # int64 [B, S], the timestep that conditioned the network at each step
    temperature: Tensor  # float32 [B, S], of the confidence noise
    drawn: Tensor | None = None  # int64 [B, S, L], the token drawn at each position, discarded ones included
    rank: Tensor | None = None  # int64 [B, S, L], 0 for the first position to be revealed; the masked come first
    exact: Tensor | None = None  # float32 [B, S], `exact_log_prob` of each step
    terms: Tensor | None = None  # int64 [B, S], its number of terms
    sharpness: Tensor | None = None  # float32 [B, S], factor on the logits at each step, None for 1
    guess: Tensor | None = None  # int64 [B, S, L], each state with the likeliest token wherever it is masked
    summary: Tensor | None = None  # float32 [B, C], what the policy knew at the last step (`pace`)


class Noise(NamedTuple):
    """All the randomness of a rollout, drawn ahead of it."""

    uniform: Tensor  # float32 [B, S, L] in [0, 1): which token is drawn
    gumbel: Tensor  # float32 [B, S, L]: which positions are revealed


class Step(NamedTuple):
    """What one step did."""

    tokens: Tensor  # int64 [B, L], the state after it
    revealed: Tensor  # bool [B, L], the positions that it revealed
    log_probs: Tensor  # float32 [B, L], log p of the drawn tokens
    drawn: Tensor  # int64 [B, L], the drawn tokens; where nothing was masked, the token that stands there
    rank: Tensor  # int64 [B, L], place of each position in the order of reveal


class Plan(NamedTuple):
    """What the steps do, known beforehand. S steps."""

    masked_after: Tensor  # int64 [B, S], tokens still masked after each step
    countdown: Tensor  # int64 [B, S], as Rollout's
    temperature: Tensor  # float32 [B, S]


def draw_noise(
    batch: int,
    steps: int,
    length: int,
    *,
    seed: int,
    first: int = 0,
    device: torch.device | str = "cpu",
) -> Noise:
    """Noise for samples first .. first + batch - 1 of a seed, each [steps, length], float32.

    A sample's noise depends on `seed` and its index alone, not on the batch around it or on the number of steps
    drawn, and is the same on every device: it is drawn on the CPU, by a generator of its own.
    """
    uniform = torch.empty(batch, steps, 2, length)
    for i in range(batch):
        torch.rand(steps, 2, length, generator=seeded(f"{seed},{first + i}"), out=uniform[i])
    gumbel = -(-uniform[:, :, 1].clamp(min=2**-25).log()).log()  # rand is a multiple of 2**-24, 0 included
    return Noise(uniform[:, :, 0].to(device), gumbel.to(device))


def step(
    logits: Tensor,
    tokens: Tensor,
    masked_after: Tensor,
    temperature: Tensor,
    uniform: Tensor,
    gumbel: Tensor,
    *,
    mask_id: int,
    order: str = "confidence",
    turns: Tensor | None = None,
) -> Step:
    """One step of parallel decoding: draw a token at every masked position, reveal some, forget the others.

    logits [B, L, V] (guided, over the codes only), tokens int64 [B, L] with mask_id where masked, masked_after int64
    [B], temperature float32 [B], uniform and gumbel float32 [B, L]. All but masked_after positions are revealed,
    those with the highest log p(drawn) + T gumbel, or the highest gumbel with order "random", or those whose turn
    comes first in a fixed order, with `turns` int64 [L] or [B, L]. Static shapes, no host synchronisation, float32:
    fit for torch.compile. (MaskGIT, arXiv 2202.04200, section 3.2.)
    """
    masked = tokens == mask_id
    drawn, log_p = sample_tokens(logits, uniform)
    if turns is not None:
        score = -turns.float().expand_as(gumbel)
    else:
        score = gumbel if order == "random" else log_p + temperature[:, None] * gumbel
    score = score.masked_fill(~masked, -torch.inf)
    # places, not thresholds: ties cannot reveal too many
    by_score = score.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(tokens.shape[-1], device=tokens.device).expand_as(tokens)
    rank = torch.empty_like(tokens).scatter(-1, by_score, places)
    revealed = masked & (rank < (masked.sum(-1) - masked_after)[:, None])
    drawn = torch.where(masked, drawn, tokens)
    return Step(torch.where(revealed, drawn, tokens), revealed, log_p, drawn, rank)


def compiled_step(device: torch.device | str) -> Callable[..., Step]:
    """`step` compiled for any number of samples and places, or itself where `can_compile` says that it cannot be."""
    return torch.compile(step, dynamic=True) if can_compile(device) else step


def places_that_are(mask: Tensor, count: int) -> Tensor:
    """Where a mask bool [B, L] is set, in rising order: int64 [B, count]; rows with fewer end in places that are not.

    `count` is the most that any row has, known beforehand: nothing waits for the device.
    """
    return mask.byte().argsort(dim=-1, descending=True, stable=True)[:, :count]


def turns(masked: Iterable[Tensor], *, length: int, narrow: bool, device: torch.device) -> Iterator[tuple[Tensor, int]]:
    """Which samples take each step, int64 [n], and at how many places: all at all, or if `narrow` the unfinished where
    something is masked. `masked` gives the number of masked tokens before each step, int64 [B] on the host."""
    samples = None
    for before in masked:
        if samples is None or not narrow:
            samples = torch.arange(len(before))
        if narrow:
            # two at least, and of places too: the compiler makes code of its own for one
            count = max(int((before > 0).sum()), min(len(before), 2))
            samples = samples[before[samples].argsort(descending=True, stable=True)[:count]].sort().values
        yield samples.to(device), max(int(before.max()), min(length, 2)) if narrow else length


def given_plan(
    steps: Tensor, tuning: Tuning | None, *, length: int, schedule: str, temperature: float
) -> tuple[Plan, tuple[Tensor, ...]]:
    """The plan of step counts int64 [B], and the masked tokens before each step (see `turns`)."""
    counts = masked_counts(steps.cpu(), length=length, kind=schedule, warp=tuning and tuning.warp)
    before = F.pad(counts, (1, 0), value=length)[:, :-1]
    heat = temperatures(steps, start=temperature)
    heat = heat if tuning is None else heat * tuning.heat[:, None]
    return Plan(counts.to(steps.device), timesteps(steps), heat), before.unbind(1)


@torch.no_grad()
def rollout(
    policy: Callable[..., Tensor],
    steps: Tensor,
    noise: Noise,
    *,
    length: int,
    mask_id: int,
    temperature: float = 2.0,
    schedule: str = "cosine",
    order: str = "confidence",
    grid: tuple[int, int] | None = None,
    record: bool = False,
    sparse: bool = False,
    guess: bool = False,
    summarise: bool = False,
    tuning: Tuning | None = None,
    step: Callable[..., Step] = step,
) -> Rollout:
    """Sample a batch, each sample in its own number of steps int64 [B], from all masked to none.

    policy(tokens int64 [B, L], timestep int64 [B]) -> logits [B, L, V] knows the prompts and applies the guidance; it
    is called steps.max() times on the whole batch, finished samples included. With `sparse` it is called as
    policy(tokens [n, L], timestep [n], samples int64 [n], places int64 [n, K]) -> logits [n, K, V], on the samples that
    are not finished, at K places that hold all that are masked: no work goes where nothing is drawn. V must not exceed
    mask_id. `noise` is [B, S or more, L]. `temperature` is that of the confidence noise at the first step; it
    falls linearly to 0 at the last. order "confidence" reveals the likeliest tokens first, "random" any, "halton" those
    of `halton_order` on the `grid` of rows and columns. N = 1 draws every token at once. `record` keeps the draws and
    the order that `exact_log_prob` needs, and its values: then all samples and places are asked for. `guess` keeps what
    the policy would most likely finish from each state. With `summarise` the policy gives, beside the logits, a summary
    of what it knows, [B or n, C] (`pace`), and that of each sample's last step is kept. `step` may be a compiled
    `speedrl.method.sampling.step`. The host waits for the device once, at the start. ValueError for shapes that do not fit and
    for another order. `tuning` has scalars for each sample, on the mask schedule, the temperature and the logits.

    Under torch.inference_mode the results are inference tensors, which autograd refuses: clone them before training.
    """
    if order not in ORDERS:
        raise ValueError(f"unknown reveal order {order!r}: choose confidence, random or halton")
    if order == "halton" and (grid is None or grid[0] * grid[1] != length):
        raise ValueError(f"the order halton needs a grid of {length} tokens, got {grid}")
    device, narrow = steps.device, sparse and not record
    order_of = halton_order(*grid).to(device) if order == "halton" else None
    plan, masked = given_plan(steps, tuning, length=length, schedule=schedule, temperature=temperature)
    asked = list(turns(masked, length=length, narrow=narrow, device=device))  # now: nothing waits for the device later
    batch, most = plan.masked_after.shape
    if noise.uniform.shape[0] != batch or noise.uniform.shape[1] < most or noise.uniform.shape[2] != length:
        raise ValueError(f"noise of shape {tuple(noise.uniform.shape)} for a rollout of {(batch, most, length)}")
    tokens = torch.full((batch, length), mask_id, device=device)
    reveal_step = torch.zeros_like(tokens)
    log_probs = torch.zeros(batch, length, device=device)
    recorded, guessed, summary = [], [], None
    sharp = None if tuning is None else sharpness(tuning, steps)  # [B, S]
    for s, (samples, count) in enumerate(asked):
        seen = tokens[samples]  # [n, L]
        every = torch.arange(length, device=device).expand_as(seen)
        places = places_that_are(seen == mask_id, count) if narrow else every
        where = samples[:, None] * length + places  # [n, K], in the flat batch
        logits = policy(seen, plan.countdown[samples, s], *((samples, places) if sparse else ()))
        if summarise:
            logits, known = logits
            summary = known.new_zeros(batch, known.shape[-1]) if summary is None else summary
            unfinished = (steps > s)[samples, None]
            summary[samples] = torch.where(unfinished, known, summary[samples])
        if sharp is not None:
            logits = logits.float() * sharp[samples, s, None, None]
        if logits.shape[-1] > mask_id:
            raise ValueError(f"logits over {logits.shape[-1]} codes would draw the mask token {mask_id}: slice them")
        before = seen.gather(1, places)
        done = step(
            logits,
            before,
            plan.masked_after[samples, s],
            plan.temperature[samples, s],
            noise.uniform[samples, s].gather(1, places),
            noise.gumbel[samples, s].gather(1, places),
            mask_id=mask_id,
            order=order,
            turns=None if order_of is None else order_of[places],
        )
        if record:
            temperature = plan.temperature[:, s]
            exact = exact_log_prob(done.log_probs, done.rank, seen == mask_id, done.revealed, temperature, order=order)
            recorded.append((done.drawn, done.rank, *exact))
        if guess:
            likely = tokens.clone()
            likely.view(-1)[where] = torch.where(before == mask_id, logits.argmax(-1), before)
            guessed.append(likely)
        tokens.view(-1)[where] = done.tokens
        reveal_step.view(-1)[where] = reveal_step.view(-1)[where].masked_fill(done.revealed, s)
        log_probs.view(-1)[where] = torch.where(done.revealed, done.log_probs, log_probs.view(-1)[where])
    of_record = [torch.stack(parts, 1) for parts in zip(*recorded, strict=True)] or [None] * 4
    finished = Rollout(tokens, reveal_step, steps, log_probs, plan.countdown, plan.temperature, *of_record)
    return finished._replace(sharpness=sharp, guess=torch.stack(guessed, 1) if guess else None, summary=summary)


def state(rollout: Rollout, step: Tensor | int, *, mask_id: int) -> Tensor:
    """Tokens as the policy saw them before `step`, an int or int64 [B]: int64 [B, L], mask_id where masked.

    Exact, as no token changes once revealed; a step at or past a sample's count gives its finished tokens.
    """
    step = torch.as_tensor(step, device=rollout.tokens.device)
    return torch.where(rollout.reveal_step < step[..., None], rollout.tokens, mask_id)
