"""Rollouts: parallel decoding of masked tokens, with everything that is needed to replay each state of it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from speedrl.method.likelihoods import log_probs, sample_tokens
from speedrl.method.sampler import Sampler
from speedrl.method.schedules import (
    checkerboard,
    halton_order,
    masked_counts,
    remasked_counts,
    remasking_steps,
    seeded,
    temperatures,
    timesteps,
)
from speedrl.method.search import Scalars, scalars_at


class Policy(Protocol):
    """What a rollout calls. `generation.Policy` is one; a function of one's own needs the two attributes."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the L tokens."""

    @property
    def mask_id(self) -> int: ...

    def __call__(self, tokens: Tensor, timestep: Tensor, samples: Tensor, positions: Tensor, /) -> Tensor:
        """Logits [n, K, V] at positions int64 [n, K] of states int64 [n, L] of the samples int64 [n], for timesteps
        int64 [n]. V must not exceed mask_id."""


REMASKED_LOGIT_SCALE = 1.5  # with nearly the whole image known, remasked tokens are drawn from sharper logits


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Rollouts of B samples of L tokens in up to S steps. `trajectory[index]` selects samples.

    Every step is of one kind: the policy sees a state, a token is drawn at each masked position, and some of these are
    kept. A remasking step first masks positions that were revealed before.
    """

    tokens: Tensor  # int64 [B, L], the finished samples
    steps: Tensor  # int64 [B], the step count N of each sample
    states: Tensor  # int64 [B, S, L], what the policy saw; past a sample's end its finished tokens
    drawn: Tensor  # int64 [B, S, L], the token drawn at each masked position, elsewhere the state's
    kept: Tensor  # bool [B, S, L], the positions that the step set
    log_probs: Tensor  # float32 [B, S, L], of the drawn tokens, 0 where nothing was drawn
    rank: Tensor  # int64 [B, S, L], place of each masked position in the reveal order, 0 for the first
    timestep: Tensor  # int64 [B, S], what conditioned the network
    temperature: Tensor  # float32 [B, S], of the reveal order
    logit_scale: Tensor  # float32 [B, S], factor on the logits
    order: str  # of the reveal, as of `Sampler`
    mask_id: int
    codes: Tensor | None = None  # float32 [B, S, V], the noise over the codes that all positions shared

    @property
    def masked(self) -> Tensor:
        """The positions that are masked in each state: bool [B, S, L]."""
        return self.states == self.mask_id

    def __getitem__(self, index: Tensor | slice) -> "Trajectory":
        """The samples at `index`, a slice or int64 [n] or bool [B]."""
        chosen: dict[str, Any] = {name: x[index] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **chosen)

    def __len__(self) -> int:
        return len(self.tokens)


class Noise(NamedTuple):
    """All the randomness of a rollout, drawn ahead of it."""

    uniform: Tensor  # float32 [B, S, L] in [0, 1): which token is drawn
    gumbel: Tensor  # float32 [B, S, L]: which positions are revealed or remasked
    codes: Tensor | None = None  # float32 [B, S, V], Gumbel: which token is drawn, alike at all positions


class Step(NamedTuple):
    """What one step did at K positions."""

    tokens: Tensor  # int64 [B, K], the state after it
    kept: Tensor  # bool [B, K], the positions that it set
    log_probs: Tensor  # float32 [B, K], log p of the drawn tokens
    drawn: Tensor  # int64 [B, K], the drawn tokens; where nothing was masked, the token that stands there
    rank: Tensor  # int64 [B, K], place of each position in the reveal order


class Plan(NamedTuple):
    """What the S steps of B samples do, known before the rollout; on the CPU."""

    masked_before: Tensor  # int64 [B, S], masked positions that each step sees, 0 past a sample's end
    masked_after: Tensor  # int64 [B, S]
    remasked: Tensor  # int64 [B, S], positions that a remasking step masks, 0 at others
    colour: Tensor  # int64 [B, S], the colour of the checkerboard that it masks them on
    timestep: Tensor  # int64 [B, S]
    temperature: Tensor  # float32 [B, S]
    logit_scale: Tensor  # float32 [B, S]


def draw_noise(
    batch: int,
    steps: int,
    length: int,
    *,
    seed: int,
    first: int = 0,
    names: Sequence[str] | None = None,
    codes: int = 0,
    device: torch.device | str = "cpu",
) -> Noise:
    """Noise for samples first .. first + batch - 1 of a seed, or for those of `names`, each [steps, length], float32.

    With `codes`, the size of the codebook, there is noise over the codes too, for samplers with `shared_noise`.
    A sample's noise depends on `seed` and its index, or its name, alone, not on the batch or on the number of steps
    drawn, and is the same on every device: it is drawn on the CPU, by a generator of its own.
    """
    uniform, over_codes = torch.empty(batch, steps, 2, length), torch.empty(batch, steps, codes)
    for i in range(batch):
        key = f"{seed},{names[i] if names else first + i}"
        torch.rand(steps, 2, length, generator=seeded(key), out=uniform[i])
        if codes:
            torch.rand(steps, codes, generator=seeded(f"{key},codes"), out=over_codes[i])
    shared = gumbel_of(over_codes).to(device) if codes else None
    return Noise(uniform[:, :, 0].to(device), gumbel_of(uniform[:, :, 1]).to(device), shared)


def gumbel_of(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise of uniform noise in [0, 1), a multiple of 2**-24 as torch.rand gives it."""
    return -(-uniform.clamp(min=2**-25).log()).log()


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
    codes: Tensor | None = None,
) -> Step:
    """One step of parallel decoding: draw a token at every masked position, keep some, forget the others.

    logits [B, K, V] (guided, over the codes only), tokens int64 [B, K] with mask_id where masked, masked_after int64
    [B], temperature float32 [B], uniform and gumbel float32 [B, K]. All but masked_after positions are kept: those with
    the highest log p(drawn) + T gumbel, or the highest gumbel with order "random", or those whose turn comes first in a
    fixed order, with `turns` int64 [K] or [B, K]. With `codes` float32 [B, V], Gumbel noise that all positions share,
    the token drawn is argmax(logits + codes), whose distribution is that of the logits. Static shapes, no host
    synchronisation, float32: fit for torch.compile. (MaskGIT, arXiv 2202.04200, section 3.2.)
    """
    masked = tokens == mask_id
    if codes is None:
        drawn, log_p = sample_tokens(logits, uniform)
    else:
        drawn = (logits.float() + codes[:, None]).argmax(-1)
        log_p = log_probs(logits, drawn)
    if turns is not None:
        score = -turns.float().expand_as(gumbel)
    else:
        score = gumbel if order == "random" else log_p + temperature[:, None] * gumbel
    score = score.masked_fill(~masked, -torch.inf)
    # places, not thresholds: ties cannot reveal too many
    by_score = score.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(tokens.shape[-1], device=tokens.device).expand_as(tokens)
    rank = torch.empty_like(tokens).scatter(-1, by_score, places)
    kept = masked & (rank < (masked.sum(-1) - masked_after)[:, None])
    drawn = torch.where(masked, drawn, tokens)
    return Step(torch.where(kept, drawn, tokens), kept, log_p, drawn, rank)


def least_likely_positions(log_probs: Tensor, count: Tensor, allowed: Tensor) -> Tensor:
    """The positions to remask: of the allowed ones the `count` whose tokens were least likely when drawn: bool [B, L].

    log_probs float32 [B, L], of each token at its latest draw; count int64 [B]; allowed bool [B, L]. Given the numbers
    recorded so far the choice is fixed, so the likelihood of a remasking step is that of the tokens drawn again. How
    the policy's parameters would change the choice itself has no gradient. (Remasking samplers: arXiv 2503.00307. The
    oldest or random positions bring nothing: measured on the embedded model.)
    """
    rank = log_probs.masked_fill(~allowed, torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
    return allowed & (rank < count[:, None])


def plan_steps(steps: Tensor, sampler: Sampler, *, length: int, scalars: Scalars | None = None) -> Plan:
    """The plan of step counts int64 [B]; S = steps.max().

    A sample of N steps reveals in N - R of them by the mask schedule and remasks in the last R (`remasking_steps`), for
    which the timestep and the temperature are those of a last step. `scalars` None are those of the sampler's table.
    """
    steps = steps.cpu()
    batch, most = len(steps), int(steps.max())
    scalars = Scalars(*(part.cpu() for part in scalars or scalars_at(sampler.scalars, steps)))
    again = remasking_steps(steps, share=sampler.remask)
    revealing = steps - again
    pad = (0, most - int(revealing.max()))
    after = F.pad(masked_counts(revealing, length=length, kind=sampler.schedule, power=scalars.schedule_power), pad)
    before = F.pad(after, (1, 0), value=length)[:, :-1]
    heat = F.pad(temperatures(revealing, start=sampler.temperature), pad) * scalars.order_temperature[:, None]
    s = torch.arange(most)
    progress = (s / (revealing[:, None] - 1).clamp(min=1)).clamp(max=1)
    first, last = scalars.logit_scale_first[:, None], scalars.logit_scale_last[:, None]
    scale = first + progress * (last - first)
    remasked = torch.zeros(batch, most, dtype=torch.int64)
    for n in set(steps[again > 0].tolist()):
        few = int(remasking_steps(torch.tensor([n]), share=sampler.remask))
        remasked[steps == n, n - few : n] = torch.tensor(remasked_counts(few, length=length, share=sampler.remask))
    here = (s >= revealing[:, None]) & (s < steps[:, None])
    return Plan(
        masked_before=torch.where(here, remasked, before),
        masked_after=after,
        remasked=remasked,
        colour=(s - revealing[:, None]).clamp(min=0) % 2,
        timestep=F.pad(timesteps(revealing), pad),
        temperature=heat,
        logit_scale=torch.where(here, REMASKED_LOGIT_SCALE * scale, scale),
    )


def first_positions(mask: Tensor, count: int) -> Tensor:
    """Where a mask bool [B, L] is set, in rising order: int64 [B, count]; rows with fewer end in places that are not.

    `count` is the most that any row has, known beforehand: nothing waits for the device.
    """
    return mask.byte().argsort(dim=-1, descending=True, stable=True)[:, :count]


def unfinished(plan: Plan, step: int) -> tuple[Tensor, int]:
    """The samples that something is masked for at a step, int64 [n] on the CPU, and the most positions of any of them.

    At least two of each, as the compiler makes code of its own for one.
    """
    before = plan.masked_before[:, step]
    count = max(int((before > 0).sum()), min(len(before), 2))
    samples = before.argsort(descending=True, stable=True)[:count].sort().values
    return samples, max(int(before.max()), 2)


@torch.no_grad()
def rollout(
    policy: Policy,
    steps: Tensor,
    noise: Noise,
    sampler: Sampler,
    *,
    scalars: Scalars | None = None,
    step: Callable[..., Step] = step,
) -> Trajectory:
    """Sample a batch, each sample in its own number of steps int64 [B], from all masked to none.

    The policy knows the prompts and applies the guidance. It is called once a step, on the samples that are not
    finished, at K positions that hold all that are masked: no work goes where nothing is drawn. `noise` is [B, S or
    more, L]. One step draws every token at once. Remasking steps mask the least likely tokens again, on one colour of
    the checkerboard at a time. `scalars` are factors for each sample in place of those of the sampler's table. `step`
    may be a compiled `step`. The host waits for the device once, at the start. ValueError for shapes that do not fit.

    Under torch.inference_mode the results are inference tensors, which autograd refuses: clone them before training.
    """
    device, (rows, columns), mask_id, batch = steps.device, policy.grid, policy.mask_id, len(steps)
    length = rows * columns
    plan = plan_steps(steps, sampler, length=length, scalars=scalars)
    most = plan.timestep.shape[1]
    if noise.uniform.shape[0] != batch or noise.uniform.shape[1] < most or noise.uniform.shape[2] != length:
        raise ValueError(f"noise of shape {tuple(noise.uniform.shape)} for a rollout of {(batch, most, length)}")
    if sampler.shared_noise and noise.codes is None:
        raise ValueError("`shared_noise` needs noise over the codes: draw_noise(..., codes=V)")
    shared = noise.codes if sampler.shared_noise else None
    asked = [unfinished(plan, s) for s in range(most)]
    remasking = plan.remasked.sum(0).tolist()
    on = Plan(*(part.to(device) for part in plan))
    turns = halton_order(rows, columns).to(device) if sampler.order == "halton" else None
    colours = checkerboard(rows, columns).to(device)
    tokens = torch.full((batch, length), mask_id, device=device)
    latest = torch.zeros(batch, length, device=device)  # log p of each token at its latest draw
    seen_at, drawn, kept, log_probs, rank = [], [], [], [], []
    for s, (samples, count) in enumerate(asked):
        samples = samples.to(device)
        if remasking[s]:
            allowed = colours == on.colour[:, s, None]
            again = least_likely_positions(latest, on.remasked[:, s], allowed)
            tokens = tokens.masked_fill(again, mask_id)
        seen = tokens[samples]  # [n, L]
        positions = first_positions(seen == mask_id, count)
        flat = samples[:, None] * length + positions  # [n, K], in the flat batch
        logits = policy(seen, on.timestep[samples, s], samples, positions)
        if logits.shape[-1] > mask_id:
            raise ValueError(f"logits over {logits.shape[-1]} codes would draw the mask token {mask_id}: slice them")
        done = step(
            logits.float() * on.logit_scale[samples, s, None, None],
            seen.gather(1, positions),
            on.masked_after[samples, s],
            on.temperature[samples, s],
            noise.uniform[samples, s].gather(1, positions),
            noise.gumbel[samples, s].gather(1, positions),
            mask_id=mask_id,
            order=sampler.order,
            turns=None if turns is None else turns[positions],
            codes=None if shared is None else shared[samples, s],
        )
        masked = seen.gather(1, positions) == mask_id
        seen_at.append(tokens)
        drawn.append(tokens.clone())
        drawn[-1].view(-1)[flat] = done.drawn
        kept.append(torch.zeros_like(tokens, dtype=torch.bool))
        kept[-1].view(-1)[flat] = done.kept
        log_probs.append(torch.zeros(batch, length, device=device))
        log_probs[-1].view(-1)[flat] = done.log_probs.masked_fill(~masked, 0)
        rank.append(torch.zeros_like(tokens))
        rank[-1].view(-1)[flat] = done.rank
        tokens = tokens.clone()
        tokens.view(-1)[flat] = done.tokens
        latest.view(-1)[flat] = torch.where(done.kept, done.log_probs, latest.view(-1)[flat])
    recorded: list[Any] = [torch.stack(x, 1) for x in (seen_at, drawn, kept, log_probs, rank)]
    recorded += [on.timestep, on.temperature, on.logit_scale, sampler.order, mask_id, shared]
    return Trajectory(tokens, steps, *recorded)


def compiled_step() -> Callable[..., Step]:
    """`step` compiled as one graph for any number of samples and positions."""
    return torch.compile(step, dynamic=True, fullgraph=True)
