"""Supervised fine-tuning: the base's own many-step images, at the states that samplers of few steps see.

The many-step sampler is the teacher, its images are the data, and the loss is the cross-entropy of masked tokens. What
it teaches is what many steps would have drawn; it is never told which of its own few-step images are good.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from speedrl.updates import optimizer_step
from torch import Tensor
from typer import Option

from experiments.alternatives.shared import compiled, kept, log, logits_of, mask_again, optimiser, save, start
from speedrl.cli import in_one_line
from speedrl.evaluation.measuring import evaluations, fingerprint
from speedrl.generation import draw
from speedrl.method.likelihoods import log_probs
from speedrl.method.schedules import parse_steps
from speedrl.models.generator import index_prompts
from speedrl.models.sources import parts_of
from speedrl.system.platform import bf16_autocast


def finetune_loss(logits: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
    """Cross-entropy in nats of targets int64 [B, L] at masked positions, a masked token on average."""
    return -(log_probs(logits, targets) * masked).sum() / masked.sum()


def finetune(
    *,
    out: Annotated[Path, Option()],  # without Option typer would take it by its place
    model: str = "embedded",
    prompts: str | None = None,
    steps: str = "1-16",
    iterations: int = 30,
    images: int = 128,
    micro_batch: int = 16,
    lr: float = 3e-5,
    clip_grad: float = 1.0,
    seed: int = 0,
    data: Path | None = None,
    compile: bool = True,
    device: str = "cpu",
) -> Path:
    """Fine-tunes `model` on images that it draws itself in its own number of steps, with its own guidance.

    Each iteration draws `images` fresh ones, masks each as at one step of a sampler of `steps` steps ("8", or "1-16"),
    and makes one update. -> OUT/model, sampled without guidance, which the images already have. In the folder `data`
    the images are kept, for trainings on the same ones with another learning rate; products are in bf16 where that is
    fast, as in `speedrl.training`.
    """
    settings, out, (least, most) = dict(locals()), Path(out), parse_steps(steps)
    student, weights = start(model, prompts, device=device), fingerprint(*parts_of(model))
    if compile:
        compiled(student.teacher.transformer, student.transformer)
    teacher, optimizer = student.teacher, optimiser(student.transformer, lr=lr)
    random = torch.Generator().manual_seed(seed)
    autocast = bf16_autocast(device)
    (out / "metrics.jsonl").unlink(missing_ok=True)
    for iteration in track(range(iterations), f"fine-tuning, seed {seed}, lr {lr:g}"):
        encoded, texts = student.draw(images, random)
        # seeds past those of evaluation: no image that is measured is also taught
        fresh = 1_000_000 + seed * 10_000 + iteration

        def drawn(texts: list[str] = texts, fresh: int = fresh) -> Tensor:
            with autocast:
                return draw(teacher, texts, steps=teacher.steps, seed=fresh)[0]

        targets = kept(data, [weights, texts, fresh], drawn).to(device, copy=True)
        counts = torch.randint(least, most + 1, (images,), generator=random)
        state, masked, timestep = mask_again(targets, counts, random, mask_id=teacher.mask_id)
        loss = 0.0
        for index in torch.arange(images, device=device).split(micro_batch):
            with autocast:
                logits = logits_of(student.policy(index_prompts(encoded, index)), state[index], timestep[index])
                part = finetune_loss(logits, targets[index], masked[index]) * (len(index) / images)
            part.backward()
            loss += part.item()
        norm = optimizer_step(optimizer, clip_grad=clip_grad).item()
        log(out, {"iteration": iteration + 1, "loss": loss, "grad_norm": norm})
    seen = iterations * images
    budget = {"images": seen, "network_evaluations": seen * (evaluations(teacher.steps, teacher.guidance) + 1)}
    return save(student, out, settings=settings, budget=budget, num_inference_steps=most)


if __name__ == "__main__":  # python -m experiments.alternatives.finetune --out FOLDER
    typer.run(in_one_line(finetune))
