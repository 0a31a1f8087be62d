"""What one update computes of a trajectory: the loss of each micro-batch, its gradient, and the optimizer's step."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from speedrl.method.divergences import SAMPLED, count_weights
from speedrl.method.likelihoods import needs_all_drawn, step_log_prob
from speedrl.method.losses import normalise, policy_loss
from speedrl.method.sampling import Trajectory
from speedrl.policies import Policy, Rows, rows, score_logits, score_rows
from speedrl.run.distributed import sum_gradients, total


def trained_steps(steps: Tensor, count: int | None, generator: torch.Generator) -> Tensor:
    """Which steps of each sample train: bool [B, S], `count` of its N at random, all where it has no more or None."""
    exists = torch.arange(int(steps.max())) < steps.cpu()[:, None]
    if count is None:
        return exists.to(steps.device)
    score = torch.rand(exists.shape, generator=generator).masked_fill(~exists, -1)
    return (exists & (score.argsort(dim=-1, descending=True).argsort(dim=-1) < count)).to(steps.device)


def log_ratios(
    token: Tensor, trajectory: Trajectory, part: Rows, *, mask_id: int, order: str, likelihood: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Log of the importance ratio of each event, the event's sample, and how many tokens it counts for.

    token float32 [P], log-probabilities of `part`'s positions by the policy that trains -> float32 [E], int64 [E],
    float32 [E]. Events: with likelihood "token" each kept token (PPO, GRPO); with "sequence" each sample, by the mean
    difference of its kept tokens (GSPO, arXiv 2507.18071); with "exact" each step, by the difference of its exact
    log-probability over its number of terms, so that clipping binds alike in steps of few and of many tokens. An event
    counts for as many tokens as it has terms, so that at ratio 1 the gradient is that of the log-likelihood.
    """
    at = (part.sample[part.row], part.step[part.row], part.position)
    kept = trajectory.kept[at]
    if likelihood == "exact":
        where = (part.sample, part.step)
        old = trajectory.log_probs[where]  # [R, L]
        new = old.index_put((part.row, part.position), token)
        fixed = (trajectory.rank[where], trajectory.states[where] == mask_id, trajectory.kept[where])
        temperature = trajectory.temperature[where]
        value, terms = step_log_prob(new, *fixed, temperature, order=order)
        before, _ = step_log_prob(old, *fixed, temperature, order=order)
        return (value - before) / terms.clamp(min=1), part.sample, terms.float()
    difference = token - trajectory.log_probs[at]
    if likelihood == "token":
        return difference, at[0], kept.float()
    of_sample = torch.zeros(len(trajectory), device=token.device)
    number = of_sample.index_add(0, at[0], kept.float())
    mean = of_sample.index_add(0, at[0], difference * kept) / number.clamp(min=1)
    return mean, torch.arange(len(trajectory), device=token.device), number


def last_draws(trajectory: Trajectory) -> Tensor:
    """Where the token that a step set is that of the finished sample: bool [B, S, L], one step for each position."""
    kept = trajectory.kept
    return kept & (kept.flip(1).cumsum(1).flip(1) == 1)


def micro_batch_loss(
    policy: Policy,
    reference: Policy | None,
    trajectory: Trajectory,
    trained: Tensor,
    advantages: Tensor,
    keep: Tensor,
    *,
    mask_id: int,
    order: str = "confidence",
    likelihood: str = "token",
    clip_range: float = 0.2,
    kl: str = "ce",
    kl_weight: float = 0.2,
    slopes: Tensor | None = None,
    codes: Tensor | None = None,
    score: Callable[..., tuple[Tensor, Tensor]] = score_logits,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped loss plus weighted divergence of m samples, a sum: divide by the kept samples of all ranks times L.

    trained bool [m, S], the steps that train; advantages float32 [m]; keep float32 [m], 0 leaves a sample out. Where K
    of a sample's N steps train, they weigh N / K: in expectation the gradient is that of all steps, as the divisor does
    not depend on the steps drawn. The divergence is of the kept tokens, or of all drawn ones with k1 to k3, and weighs
    less in few steps (`count_weights`). `slopes` [m, L, C] of the `codes` [V, C] add the expected gain of the last
    tokens. Statistics are sums, but for "ratio_max".
    """
    all_drawn = needs_all_drawn(likelihood, order) or kl in SAMPLED
    part = rows(trajectory, trained, mask_id=mask_id, all_drawn=all_drawn)
    token, away, gain = score_rows(policy, reference, trajectory, part, kl=kl, slopes=slopes, codes=codes, score=score)
    scale = keep * trajectory.steps / trained.sum(-1).clamp(min=1)  # [m]
    ratio, sample, tokens = log_ratios(token, trajectory, part, mask_id=mask_id, order=order, likelihood=likelihood)
    loss, stats = policy_loss(ratio, advantages[sample], tokens * scale[sample], clip_range=clip_range)
    place = part.sample[part.row]
    kept = trajectory.kept[place, part.step[part.row], part.position].float()
    weights = kept * scale[place]
    if slopes is not None:  # a token that a later step drew again is not in the image
        loss = loss - (gain * weights * last_draws(trajectory)[place, part.step[part.row], part.position]).sum()
    if kl in SAMPLED:  # the mean over the drawn tokens counts for those that were kept
        number = torch.zeros(2, len(part.sample), device=token.device)
        number = number.index_add(1, part.row, torch.stack([kept, torch.ones_like(kept)]))
        weights = (number[0] / number[1].clamp(min=1))[part.row] * scale[place]
    held = away * weights * count_weights(trajectory.steps)[place]
    stats |= {"kl": (away * weights).sum().detach(), "tokens": weights.sum()}
    return loss + kl_weight * held.sum(), stats


def gradients(
    policy: Policy,
    reference: Policy | None,
    trajectory: Trajectory,
    trained: Tensor,
    advantages: Tensor,
    keep: Tensor,
    divisor: Tensor,
    micro_batch: int,
    *,
    autocast: torch.autocast,
    slopes: Tensor | None = None,
    **how: Any,
) -> dict[str, float]:
    """Adds the gradient of B samples to the parameters', `micro_batch` samples at a time, whatever their number.

    As `micro_batch_loss`, which `how` is for; `divisor` is a scalar. Samples that are not kept cost nothing; all ranks
    take equally many, as sharded ones must. Returns the statistics over all micro-batches.
    """
    totals: dict[str, float] = {}
    kept = max(1, int(total(keep.count_nonzero(), largest=True)))
    for index in keep.argsort(descending=True, stable=True)[:kept].split(micro_batch):
        with autocast:
            loss, stats = micro_batch_loss(
                policy[index], None if reference is None else reference[index], trajectory[index], trained[index],
                advantages[index], keep[index], slopes=None if slopes is None else slopes[index], **how,
            )
        loss = loss * (1 + 0 * loss.detach())  # one that is not finite has a gradient that is not, whatever made it so
        normalise(loss, divisor).backward()
        for name, value in stats.items():
            merge = max if name.endswith("_max") else float.__add__
            totals[name] = merge(totals.get(name, 0.0), value.item())
    return totals


def with_oom_backoff(
    run: Callable[[int], Any], size: int, *, undo: Callable[[], None] = lambda: None, halve: bool = True
) -> tuple[Any, int]:
    """run(size), with half the size again each time that the device's memory runs out, and the size that fitted.

    `undo` takes back what a failed call left. With `halve` off the error is raised: ranks that share the weights of
    each micro-batch cannot differ in their number.
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


def optimizer_step(optimizer: torch.optim.Optimizer, *, clip_grad: float) -> Tensor:
    """Sums the gradients of all ranks, clips those of each group of parameters, takes a step if they are finite.

    Returns the first group's norm before clipping, a scalar, or NaN where another's is not finite.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    sum_gradients([p for group in groups for p in group])
    norms = [nn.utils.clip_grad_norm_(group, clip_grad) for group in groups]
    norm, *others = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms)
    norm = norm + 0 * sum(others)
    if norm.isfinite():
        optimizer.step()
    optimizer.zero_grad()
    return norm


@torch.no_grad()
def ema_update(average: Mapping[str, Tensor], learned: Mapping[str, Tensor], *, decay: float, updates: int) -> None:
    """Moves the exponential moving average of the weights towards them, in place; faster over the first updates, so
    that where it started does not count for long."""
    decay = min(decay, (1 + updates) / (10 + updates))
    for name, value in average.items():
        value.lerp_(learned[name].detach(), 1 - decay)


def iteration_metrics(
    iteration: int, rewards: Tensor, quality: Tensor, steps: Tensor, keep: Tensor, norm: Tensor,
    totals: Mapping[str, float],
) -> dict[str, float]:
    """A row of metrics: rewards, steps and keep [B], quality [G, n], and what `gradients` summed over all ranks.

    reward: mean of the joint reward. quality: mean of the quality alone. steps: mean step count. group_std: mean
    standard deviation of the quality within groups. kl: divergence from the reference, nats a token. clip_fraction:
    share of what the loss weighs whose gradient was clipped away. kept: share of the samples that train.
    """
    return {
        "iteration": iteration,
        "reward": rewards.mean().item(),
        "quality": quality.mean().item(),
        "steps": steps.float().mean().item(),
        "group_std": quality.std(1, correction=0).mean().item(),
        "kl": totals["kl"] / max(totals["tokens"], 1),
        "clip_fraction": totals["clipped"] / max(totals["weight"], 1),
        "ratio_max": totals["ratio_max"],
        "grad_norm": norm.item(),
        "kept": keep.mean().item(),
    }


def part_means(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """The means of several qualities by name; nothing of one alone, which is the quality."""
    return {name: part.mean().item() for name, part in parts.items()} if len(parts) > 1 else {}
