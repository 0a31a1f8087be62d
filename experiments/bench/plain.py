"""A reinforcement-learning iteration as one would first write it, against which ours is measured.

Every step is a call on every token, the logits of every position and step go through log-softmax over the whole
codebook and are kept for autograd, the reference policy does all of that too, and nothing is compiled.
"""

import torch
from torch import Tensor, nn

from speedrl.method.schedules import masked_counts, temperatures
from speedrl.models.generator import Prompts, cat_prompts


def guided_logits(
    transformer: nn.Module, tokens: Tensor, timestep: int, prompts: Prompts, empty: Prompts, *, guidance: float,
    grid: tuple[int, int],
) -> Tensor:
    """Logits of every position: int64 [B, L] -> float32 [B, L, V]."""
    countdown = torch.full((len(tokens),), timestep, device=tokens.device)
    if guidance == 1:
        return transformer(tokens.unflatten(1, grid), countdown, *prompts).float()
    both = cat_prompts(empty, prompts)
    found = transformer(tokens.repeat(2, 1).unflatten(1, grid), countdown.repeat(2), *both)
    uncond, cond = found.float().chunk(2)
    return uncond + guidance * (cond - uncond)


@torch.no_grad()
def plain_rollout(
    transformer: nn.Module, prompts: Prompts, empty: Prompts, *, steps: int, guidance: float, grid: tuple[int, int],
    mask_id: int,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """States before each step, what each revealed, the tokens and their log-probabilities [B, L]."""
    batch, length, device = len(prompts.text), grid[0] * grid[1], prompts.text.device
    count = torch.tensor([steps])
    left, heat = masked_counts(count, length=length)[0].tolist(), temperatures(count)[0].tolist()
    tokens = torch.full((batch, length), mask_id, device=device)
    old = torch.zeros(batch, length, device=device)
    states, reveals = [], []
    for s in range(steps):
        logits = guided_logits(transformer, tokens, steps - 1 - s, prompts, empty, guidance=guidance, grid=grid)
        log_p = logits.log_softmax(-1)
        drawn = torch.multinomial(log_p.exp().flatten(0, 1), 1).view(batch, length)
        chosen = log_p.gather(-1, drawn[..., None]).squeeze(-1)
        gumbel = -torch.rand(batch, length, device=device).clamp(min=1e-9).log().neg().log()
        masked = tokens == mask_id
        score = (chosen + heat[s] * gumbel).masked_fill(~masked, -torch.inf)
        best = score.topk(int(masked[0].sum()) - left[s], dim=-1).indices
        revealed = torch.zeros_like(masked).scatter(1, best, True)
        states.append(tokens)
        reveals.append(revealed)
        tokens = torch.where(revealed, drawn, tokens)
        old = torch.where(revealed, chosen, old)
    return states, reveals, tokens, old


def plain_update(
    transformer: nn.Module, reference: nn.Module, optimizer: torch.optim.Optimizer, sampled: tuple, prompts: Prompts,
    empty: Prompts, advantages: Tensor, *, steps: int, guidance: float, grid: tuple[int, int], each_step: bool,
    autocast: torch.autocast, kl_weight: float = 0.02, clip_range: float = 0.2,
) -> None:
    """One update on the clipped loss and the divergence, one backward pass of all steps or, if asked, of each."""
    states, reveals, tokens, old = sampled
    total = 0.0
    for s in range(steps):
        with autocast:
            how = {"guidance": guidance, "grid": grid}
            log_p = guided_logits(transformer, states[s], steps - 1 - s, prompts, empty, **how).log_softmax(-1)
            with torch.no_grad():
                before = guided_logits(reference, states[s], steps - 1 - s, prompts, empty, **how).log_softmax(-1)
            token = log_p.gather(-1, tokens[..., None]).squeeze(-1)
            away = (before.exp() * (before - log_p)).sum(-1)
            ratio = torch.where(reveals[s], token - old, 0).exp()
            gain = torch.minimum(
                ratio * advantages[:, None], ratio.clamp(1 - clip_range, 1 + clip_range) * advantages[:, None]
            )
            loss = ((kl_weight * away - gain) * reveals[s]).sum() / tokens.numel()
        if each_step:
            loss.backward()
        else:
            total = total + loss
    if not each_step:
        total.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
