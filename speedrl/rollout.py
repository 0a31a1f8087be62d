"""Rollouts: parallel decoding of masked tokens, with all that is needed to replay every state of it."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from speedrl.likelihood import exact_log_prob, sample_tokens
from speedrl.schedule import halton_order, masked_counts, temperatures, timesteps

ORDERS = ("confidence", "random", "halton")


class Rollout(NamedTuple):
    """Finished samples. B samples, L tokens, S = steps.max() steps."""

    tokens: Tensor  # int64 [B, L]
    reveal_step: Tensor  # int64 [B, L], the step 0..N-1 that revealed each token
    steps: Tensor  # int64 [B], the step count N of each sample
    log_probs: Tensor  # float32 [B, L], log p of each token at the step that revealed it
    drawn: Tensor | None = None  # int64 [B, S, L], the token drawn at each position, discarded ones included
    rank: Tensor | None = None  # int64 [B, S, L], 0 for the first position to be revealed; the masked come first
    exact: Tensor | None = None  # float32 [B, S], `exact_log_prob` of each step
    terms: Tensor | None = None  # int64 [B, S], its number of terms


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


def draw_noise(
    batch: int, steps: int, length: int, *, seed: int, first: int = 0, device: torch.device | str = "cpu"
) -> Noise:
    """Noise for samples first .. first + batch - 1 of a seed, each [steps, length], float32.

    A sample's noise depends on `seed` and its index alone, not on the batch around it or on the number of steps
    drawn, and is the same on every device: it is drawn on the CPU, by a generator of its own.
    """
    uniform = torch.empty(batch, steps, 2, length)
    for i in range(batch):
        # torch's CPU generator keeps only 32 bits of its seed: hash into them, so that neighbours are unrelated
        digest = hashlib.blake2b(f"{seed},{first + i}".encode(), digest_size=4).digest()
        torch.rand(steps, 2, length, generator=torch.Generator().manual_seed(int.from_bytes(digest)), out=uniform[i])
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


def places_that_are(mask: Tensor, count: int) -> Tensor:
    """Where a mask bool [B, L] is set, in rising order: int64 [B, count]; rows with fewer end in places that are not.

    `count` is the most that any row has, known beforehand: nothing waits for the device.
    """
    return mask.byte().argsort(dim=-1, descending=True, stable=True)[:, :count]


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
    the order that `exact_log_prob` needs, and its values: then all samples and places are asked for. `step` may be a
    compiled `speedrl.rollout.step`. The host waits for the device once, at the start. ValueError for shapes that do not
    fit and for another order.

    Under torch.inference_mode the results are inference tensors, which autograd refuses: clone them before training.
    """
    if order not in ORDERS:
        raise ValueError(f"unknown reveal order {order!r}: choose confidence, random or halton")
    if order == "halton" and (grid is None or grid[0] * grid[1] != length):
        raise ValueError(f"the order halton needs a grid of {length} tokens, got {grid}")
    device, on_host = steps.device, steps.cpu()
    turns = halton_order(*grid).to(device) if order == "halton" else None
    masked_after = masked_counts(on_host, length=length, kind=schedule)
    batch, most = masked_after.shape
    if noise.uniform.shape[0] != batch or noise.uniform.shape[1] < most or noise.uniform.shape[2] != length:
        raise ValueError(f"noise of shape {tuple(noise.uniform.shape)} for a rollout of {(batch, most, length)}")
    narrow = sparse and not record
    longest = on_host.argsort(descending=True, stable=True)
    asked = []  # at each step: which samples, and at how many places
    for s in range(most):
        # two at least: the compiler makes code of its own for a batch of one
        count = max(int((on_host > s).sum()), min(batch, 2)) if narrow else batch
        samples = longest[:count].sort().values
        asked.append((samples.to(device), int(masked_after[samples, s - 1].max()) if narrow and s else length))
    masked_after, countdown, heat = masked_after.to(device), timesteps(steps), temperatures(steps, start=temperature)
    tokens = torch.full((batch, length), mask_id, device=device)
    reveal_step = torch.zeros_like(tokens)
    log_probs = torch.zeros(batch, length, device=device)
    recorded = []
    for s, (samples, count) in enumerate(asked):
        seen = tokens[samples]  # [n, L]
        every = torch.arange(length, device=device).expand_as(seen)
        places = places_that_are(seen == mask_id, count) if narrow else every
        where = samples[:, None] * length + places  # [n, K], in the flat batch
        logits = policy(seen, countdown[samples, s], *((samples, places) if sparse else ()))
        if logits.shape[-1] > mask_id:
            raise ValueError(f"logits over {logits.shape[-1]} codes would draw the mask token {mask_id}: slice them")
        before = seen.gather(1, places)
        done = step(
            logits,
            before,
            masked_after[samples, s],
            heat[samples, s],
            noise.uniform[samples, s].gather(1, places),
            noise.gumbel[samples, s].gather(1, places),
            mask_id=mask_id,
            order=order,
            turns=None if turns is None else turns[places],
        )
        if record:
            exact = exact_log_prob(done.log_probs, done.rank, seen == mask_id, done.revealed, heat[:, s], order=order)
            recorded.append((done.drawn, done.rank, *exact))
        tokens.view(-1)[where] = done.tokens
        reveal_step.view(-1)[where] = reveal_step.view(-1)[where].masked_fill(done.revealed, s)
        log_probs.view(-1)[where] = torch.where(done.revealed, done.log_probs, log_probs.view(-1)[where])
    return Rollout(
        tokens, reveal_step, steps, log_probs, *(torch.stack(parts, 1) for parts in zip(*recorded, strict=True))
    )


def state(rollout: Rollout, step: Tensor | int, *, mask_id: int) -> Tensor:
    """Tokens as the policy saw them before `step`, an int or int64 [B]: int64 [B, L], mask_id where masked.

    Exact, as no token changes once revealed; a step at or past a sample's count gives its finished tokens.
    """
    step = torch.as_tensor(step, device=rollout.tokens.device)
    return torch.where(rollout.reveal_step < step[..., None], rollout.tokens, mask_id)
