"""The numbers of an iteration."""

from collections.abc import Mapping

from torch import Tensor


def iteration_metrics(
    iteration: int, rewards: Tensor, quality: Tensor, steps: Tensor, keep: Tensor, norm: Tensor,
    totals: Mapping[str, float],
) -> dict[str, float]:
    """A row of metrics: rewards, steps and keep [B], quality [G, n], and the statistics of `grpo_loss` of all ranks.

    reward: mean of the joint reward. quality: mean of the quality alone. steps: mean step count. group_std: mean
    standard deviation of the quality within groups. kl: divergence from the reference, nats a token. hindsight: that
    from the reference with hindsight. approx_kl: divergence of the new policy from the one that drew the rollout.
    clip_fraction: share of what the loss weighs whose gradient was clipped away. mismatch: mean difference between
    log-probabilities in training and in the rollout. kept: share of the samples in the policy loss.
    """
    tokens, weight = max(totals["tokens"], 1), max(totals["weight"], 1)
    row = {
        "iteration": iteration,
        "reward": rewards.mean().item(),
        "quality": quality.mean().item(),
        "steps": steps.float().mean().item(),
        "group_std": quality.std(1, correction=0).mean().item(),
        "kl": totals["kl"] / tokens,
        "approx_kl": totals["approx_kl"] / weight,
        "clip_fraction": totals["clipped"] / weight,
        "ratio_max": totals["ratio_max"],
        "mismatch": totals["mismatch"] / tokens,
        "grad_norm": norm.item(),
        "kept": keep.mean().item(),
    }
    return row | ({"hindsight": totals["hindsight"] / tokens} if "hindsight" in totals else {})


def part_means(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """The means of several qualities by name; nothing of one alone, which is the quality."""
    return {name: part.mean().item() for name, part in parts.items()} if len(parts) > 1 else {}
