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
    comes first in a fixed order, with `turns` int64 [L]. Static shapes, no host synchronisation, float32: fit for
    torch.compile. (MaskGIT, arXiv 2202.04200, section 3.2.)
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


@torch.no_grad()
def rollout(
    policy: Callable[[Tensor, Tensor], Tensor],
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
    step: Callable[..., Step] = step,
) -> Rollout:
    """Sample a batch, each sample in its own number of steps int64 [B], from all masked to none.

    policy(tokens int64 [B, L], timestep int64 [B]) -> logits [B, L, V] knows the prompts and applies the guidance; it
    is called steps.max() times on the whole batch, finished samples included, so that shapes stay static. V must not
    exceed mask_id. `noise` is [B, S or more, L]. `temperature` is that of the confidence noise at the first step; it
    falls linearly to 0 at the last. order "confidence" reveals the likeliest tokens first, "random" any, "halton" those
    of `halton_order` on the `grid` of rows and columns. N = 1 draws every token at once. `record` keeps the draws and
    the order that `exact_log_prob` needs, and its values. `step` may be a compiled `speedrl.rollout.step`. ValueError
    for shapes that do not fit and for another order.

    Under torch.inference_mode the results are inference tensors, which autograd refuses: clone them before training.
    """
    if order not in ORDERS:
        raise ValueError(f"unknown reveal order {order!r}: choose confidence, random or halton")
    if order == "halton" and (grid is None or grid[0] * grid[1] != length):
        raise ValueError(f"the order halton needs a grid of {length} tokens, got {grid}")
    turns = halton_order(*grid).to(steps.device) if order == "halton" else None
    masked_after = masked_counts(steps, length=length, kind=schedule)
    batch, most = masked_after.shape
    if noise.uniform.shape[0] != batch or noise.uniform.shape[1] < most or noise.uniform.shape[2] != length:
        raise ValueError(f"noise of shape {tuple(noise.uniform.shape)} for a rollout of {(batch, most, length)}")
    countdown, heat = timesteps(steps), temperatures(steps, start=temperature)
    tokens = torch.full((batch, length), mask_id, device=steps.device)
    reveal_step = torch.zeros_like(tokens)
    log_probs = torch.zeros(batch, length, device=steps.device)
    recorded = []
    for s in range(most):
        logits = policy(tokens, countdown[:, s])
        if logits.shape[-1] > mask_id:
            raise ValueError(f"logits over {logits.shape[-1]} codes would draw the mask token {mask_id}: slice them")
        done = step(
            logits,
            tokens,
            masked_after[:, s],
            heat[:, s],
            noise.uniform[:, s],
            noise.gumbel[:, s],
            mask_id=mask_id,
            order=order,
            turns=turns,
        )
        if record:
            exact = exact_log_prob(done.log_probs, done.rank, tokens == mask_id, done.revealed, heat[:, s], order=order)
            recorded.append((done.drawn, done.rank, *exact))
        tokens = done.tokens
        reveal_step = reveal_step.masked_fill(done.revealed, s)
        log_probs = torch.where(done.revealed, done.log_probs, log_probs)
    return Rollout(
        tokens, reveal_step, steps, log_probs, *(torch.stack(parts, 1) for parts in zip(*recorded, strict=True))
    )


def state(rollout: Rollout, step: Tensor | int, *, mask_id: int) -> Tensor:
    """Tokens as the policy saw them before `step`, an int or int64 [B]: int64 [B, L], mask_id where masked.

    Exact, as no token changes once revealed; a step at or past a sample's count gives its finished tokens.
    """
    step = torch.as_tensor(step, device=rollout.tokens.device)
    return torch.where(rollout.reveal_step < step[..., None], rollout.tokens, mask_id)
