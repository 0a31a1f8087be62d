"""Supervised fine-tuning: the base's own many-step pictures, at the states that few steps see.

The many-step sampler is the teacher, its pictures are the data, and the loss is the cross-entropy of training. What it
teaches is what many steps would have put there; it is never told which of its own few-step pictures are good.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from torch import Tensor
from typer import Option

from experiments.alternatives.shared import compiled, kept, log, optimiser, save, start
from speedrl.cli import in_one_line
from speedrl.evaluation.measuring import fingerprint, network_calls
from speedrl.generation import generate, guided_policy
from speedrl.method.likelihoods import log_probs
from speedrl.method.sampling import Noise, draw_noise
from speedrl.method.schedules import masked_counts, step_range, temperatures, timesteps
from speedrl.models.checkpoint import Prompts, parts_of, take
from speedrl.system.platform import bf16_autocast
from speedrl.updates import descend


@torch.no_grad()
def forced_reveals(
    policy: Callable[[Tensor, Tensor], Tensor],
    targets: Tensor,
    steps: Tensor,
    noise: Noise,
    *,
    mask_id: int,
    temperature: float,
    schedule: str = "cosine",
) -> Tensor:
    """When a few-step rollout by confidence would reveal each token, had it drawn `targets` int64 [B, L] at every step.

    As `speedrl.method.sampling.rollout`, with steps int64 [B] and noise of [B, S, L], but what is drawn is given -> int64
    [B, L], the step that reveals each token.
    """
    masked_after = masked_counts(steps, length=targets.shape[1], kind=schedule)
    countdown, heat, never = timesteps(steps), temperatures(steps, start=temperature), int(steps.max())
    reveal_step = torch.full_like(targets, never)
    for s in range(never):
        masked = reveal_step == never
        log_p = log_probs(policy(torch.where(masked, mask_id, targets), countdown[:, s]), targets)
        score = (log_p + heat[:, s, None] * noise.gumbel[:, s]).masked_fill(~masked, -torch.inf)
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        reveal_step[masked & (rank < (masked.sum(-1) - masked_after[:, s])[:, None])] = s
    return reveal_step


def finetune_loss(
    policy: Callable[[Tensor, Tensor], Tensor], targets: Tensor, reveal_step: Tensor, step: Tensor, steps: Tensor, *,
    mask_id: int,
) -> Tensor:  # fmt: skip
    """Cross-entropy in nats of the tokens that are masked before `step` int64 [B], a masked token on average."""
    masked = reveal_step >= step[:, None]
    logits = policy(torch.where(masked, mask_id, targets), steps - 1 - step)
    return -(log_probs(logits, targets) * masked).sum() / masked.sum()


def finetune(
    *,
    out: Annotated[Path, Option()],  # without Option typer would take it by its place
    model: str = "embedded",
    prompts: str | None = None,
    steps: str = "2-16",
    iterations: int = 30,
    pictures: int = 64,
    micro_batch: int = 16,
    lr: float = 3e-5,
    clip_grad: float = 1.0,
    seed: int = 0,
    data: Path | None = None,
    compile: bool = True,
    device: str = "cpu",
) -> Path:
    """Fine-tunes `model` on pictures that it draws itself in its own number of steps, with its own guidance.

    Each iteration draws `pictures` fresh ones, takes each at one step of a rollout of `steps` steps ("8", or "2-16")
    that reveals them, and makes one update. -> OUT/model, sampled without guidance, which the pictures already have.
    In the folder `data` the pictures are kept, for trainings on the same ones with another learning rate; products
    are in bf16 where that is fast, as in `speedrl.training`.
    """
    settings, out, bounds = dict(locals()), Path(out), step_range(steps)
    if bounds.chosen:
        raise ValueError(f"fine-tuning has no policy that chooses its steps: give a number or a range, not {steps!r}")
    student, weights = start(model, prompts, device=device), fingerprint(*parts_of(model))
    if compile:
        compiled(student.teacher.transformer, student.transformer)
    teacher, optimizer = student.teacher, optimiser(student.transformer, lr=lr)
    random = torch.Generator().manual_seed(seed)
    calls, autocast = 0, bf16_autocast(device)
    (out / "metrics.jsonl").unlink(missing_ok=True)
    for iteration in track(range(iterations), f"fine-tuning, seed {seed}, lr {lr:g}"):
        encoded, texts = student.draw(pictures, random)
        # seeds past those of evaluation: no picture that is measured is also taught
        fresh = 1_000_000 + seed * 10_000 + iteration

        def drawn(texts: list[str] = texts, fresh: int = fresh) -> Tensor:
            with autocast:
                return generate(teacher, texts, steps=teacher.steps, seed=fresh)

        targets = kept(data, [weights, texts, fresh], drawn).to(device, copy=True)
        counts = torch.randint(bounds[0], bounds[1] + 1, (pictures,), generator=random).to(device)
        step = (torch.rand(pictures, generator=random).to(device) * counts).long()
        noise = draw_noise(pictures, bounds[1], student.length, seed=seed, first=iteration * pictures, device=device)

        def policy(part: Prompts) -> Callable[[Tensor, Tensor], Tensor]:
            return guided_policy(student.transformer, part, student.empty, guidance=1, grid=teacher.grid)

        with autocast:
            reveal_step = forced_reveals(
                policy(encoded), targets, counts, noise, mask_id=teacher.mask_id, temperature=teacher.temperature,
                schedule=teacher.schedule,
            )  # fmt: skip
        calls += pictures * (network_calls(teacher.steps, teacher.guidance) + int(counts.max()) + 1)
        loss = 0.0
        for index in torch.arange(pictures, device=device).split(micro_batch):
            with autocast:
                part = finetune_loss(
                    policy(take(encoded, index)), targets[index], reveal_step[index], step[index], counts[index],
                    mask_id=teacher.mask_id,
                ) * (len(index) / pictures)  # fmt: skip
            part.backward()
            loss += part.item()
        norm = descend(optimizer, clip_grad=clip_grad).item()
        log(out, {"iteration": iteration + 1, "loss": loss, "grad_norm": norm})
    budget = {"pictures_seen": iterations * pictures, "network_calls": calls}
    return save(student, out, settings=settings, budget=budget, num_inference_steps=bounds[1])


if __name__ == "__main__":  # python -m experiments.alternatives.finetune --out FOLDER
    typer.run(in_one_line(finetune))
