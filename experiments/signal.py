"""How much of a batch's gradient is signal, for each estimator: minutes, and no training.

`python -m experiments.signal --model RUN --steps 4` draws batches from a model, computes each estimator's gradient of
each batch, and prints

    signal     mean product of the gradients of two different batches: the squared norm of the mean gradient
    norm       mean squared norm of the gradient of one batch
    share      signal / norm, with its standard error by the jackknife over batches: 1 where a batch has no noise
    images/s   of rollout, reward and gradient together
    share/s    share times batches a second: what an estimator gives for a second of computing

The reward is the embedded one, without a KL. RUN is the base with a searched sampler: `speedrl train --iterations 0`.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from typer import Option

from speedrl.cli import in_one_line
from speedrl.generation import make_policy
from speedrl.learner import draw_prompts
from speedrl.method.advantages import group_advantages
from speedrl.method.divergences import ce_kl
from speedrl.method.hindsight import hide
from speedrl.method.ratios import exact_events, token_events
from speedrl.method.sampling import Noise, draw_noise, rollout
from speedrl.method.scoring import trained_steps
from speedrl.models.generator import Generator, decode
from speedrl.models.loading import load_generator
from speedrl.models.sources import find
from speedrl.rewards.loading import load_quality
from speedrl.run.prompts import open_prompts
from speedrl.system.files import write_json
from speedrl.system.platform import bf16_autocast, quiet_allocator
from speedrl.training import grpo_loss

ESTIMATORS: dict[str, dict[str, Any]] = {
    "token": {"likelihood": token_events},
    "exact": {"likelihood": exact_events},
    "token, shared noise": {"likelihood": token_events, "shared": True},
    "exact, shared noise": {"likelihood": exact_events, "shared": True},
    "hindsight": {"likelihood": token_events, "hindsight": 1.0, "rewarded": False},
    "token and hindsight": {"likelihood": token_events, "hindsight": 1.0},
}


def share_noise(noise: Noise, group_size: int, step: int) -> Noise:
    """The noise of a group's first sample for all of the group, but for one step, which varies."""
    def shared(part: Tensor) -> Tensor:
        found = part[::group_size].repeat_interleave(group_size, 0)
        found[:, step] = part[:, step]
        return found

    return Noise(*map(shared, noise))


def gradient(
    generator: Generator, reference: Generator, texts: list[str], quality: Callable, steps: int, *, batch: int,
    group_size: int, share: float, likelihood: Callable, hindsight: float = 0.0, shared: bool = False,
    rewarded: bool = True,
) -> Tensor:
    """The gradient of a batch by an estimator, as one vector float32 [parameters]."""
    samples, length = len(texts), generator.grid[0] * generator.grid[1]
    random, counts = torch.Generator().manual_seed(batch), torch.full((samples,), steps)
    noise = draw_noise(samples, steps, length, seed=7, first=batch * samples)
    trained = trained_steps(counts, None, random)
    if shared:
        varied = int(torch.randint(steps, (), generator=random))
        noise, trained = share_noise(noise, group_size, varied), torch.zeros_like(trained)
        trained[:, varied] = True
    policy, before = make_policy(generator, texts, guidance=1.0), make_policy(reference, texts)
    sampler = generator.sampler.replace(guidance=1.0)
    with bf16_autocast("cpu"):
        trajectory = rollout(policy, counts, noise, sampler)
        advantages = torch.zeros(samples)
        if rewarded:
            scores = quality(decode(generator, trajectory.tokens), texts)
            advantages = group_advantages(scores.view(-1, group_size)).flatten()
        uniform = torch.rand(samples, length, generator=random)
        finished = hide(trajectory.tokens, uniform, share=share, mask_id=generator.mask_id) if hindsight else None
        for index in torch.arange(samples).split(16):
            loss, _ = grpo_loss(
                policy[index], before[index] if hindsight else None, trajectory[index], advantages[index],
                torch.ones(len(index)), trained[index], likelihood=likelihood, kl=ce_kl, kl_weight=0.0,
                hindsight=hindsight, finished=None if finished is None else finished[index])
            (loss / (samples * length)).backward()
    found = torch.cat([p.grad.flatten() for p in generator.transformer.parameters() if p.grad is not None])
    generator.transformer.zero_grad()
    return found


def signal_of(gradients: Tensor) -> dict[str, float]:
    """signal, norm, share and its standard error, of the gradients of K batches [K, parameters]."""
    products = gradients @ gradients.T

    def of(keep: Tensor) -> tuple[Tensor, Tensor]:
        part = products[keep][:, keep]
        norm, k = part.diagonal().mean(), len(part)
        return (part.sum() - part.diagonal().sum()) / (k * (k - 1)), norm

    k, every = len(gradients), torch.ones(len(gradients), dtype=torch.bool)
    signal, norm = of(every)
    without = torch.stack([s / n for s, n in (of(every & (torch.arange(k) != i)) for i in range(k))])
    error = ((k - 1) / k * (without - without.mean()).square().sum()).sqrt()
    return {"signal": signal.item(), "norm": norm.item(), "share": (signal / norm).item(), "error": error.item()}


def main(
    *,
    model: Annotated[str, Option(help="What draws: a model with a searched sampler.")] = "embedded",
    steps: Annotated[int, Option(help="Steps of each image.")] = 4,
    batches: Annotated[int, Option(help="Batches; the error falls with their number.")] = 10,
    groups: Annotated[int, Option(help="Prompts of a batch.")] = 8,
    group_size: Annotated[int, Option(help="Images of each prompt.")] = 16,
    share: Annotated[float, Option(help="Share of the tokens hidden from the reference, for hindsight.")] = 0.75,
    only: Annotated[str, Option(help=f"One of: {'; '.join(ESTIMATORS)}. [default: all]", show_default=False)] = "",
    out: Annotated[Path, Option(help="Where the numbers go, as JSON.")] = Path("runs/signal.json"),
) -> None:
    """Measure the signal and the noise of gradient estimators."""
    if only and only not in ESTIMATORS:
        raise ValueError(f"`only` must be one of {'; '.join(ESTIMATORS)}, got {only!r}")
    quiet_allocator()
    generator, reference, quality = load_generator(model), load_generator(model), load_quality("embedded")
    reference.transformer.requires_grad_(False)
    prompts, random = open_prompts(find("embedded") / "prompts/train.txt"), torch.Generator().manual_seed(0)
    asked = [[prompts[i] for i in draw_prompts(len(prompts), groups, random) for _ in range(group_size)]
             for _ in range(batches)]
    rows = []
    print("| estimator | signal | norm | share | images/s | share/s |\n|---|--:|--:|--:|--:|--:|")
    for name in [only] if only else ESTIMATORS:
        began, how = time.perf_counter(), ESTIMATORS[name]
        found = [gradient(generator, reference, texts, quality, steps, batch=i, group_size=group_size, share=share,
                          **how) for i, texts in enumerate(asked)]
        seconds = (time.perf_counter() - began) / batches
        row = {"estimator": name, **signal_of(torch.stack(found)), "images_per_second": len(asked[0]) / seconds}
        rows.append(row | {"share_per_second": row["share"] / seconds})
        print(f"| {name} | {row['signal']:.2e} | {row['norm']:.2e} | {row['share']:.3f} ± {row['error']:.3f} | "
              f"{row['images_per_second']:.1f} | {row['share'] / seconds:.5f} |", flush=True)
        write_json(out, {"model": model, "steps": steps, "batches": batches, "images": len(asked[0]), "rows": rows})


if __name__ == "__main__":
    typer.run(in_one_line(main))
