"""Best-of-n fine-tuning: the model draws n images of each prompt, and learns the best one by the reward.

The loss is the cross-entropy of the best images' tokens, masked as samplers of few steps see them. It has the images
and the reward of reinforcement learning, and neither the other images nor a policy gradient.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from torch import Tensor
from typer import Option

from experiments.alternatives.shared import compiled, log, logits_of, mask_again, optimiser, save, start, update
from speedrl.cli import in_one_line
from speedrl.generation import draw
from speedrl.method.likelihoods import log_probs
from speedrl.method.steps import step_choices
from speedrl.models.generator import decode, index_prompts
from speedrl.rewards.loading import load_quality
from speedrl.system.platform import bf16_autocast


def finetune_loss(logits: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
    """Cross-entropy in nats of targets int64 [B, L] at masked positions, a masked token on average."""
    return -(log_probs(logits, targets) * masked).sum() / masked.sum()


def best_of(tokens: Tensor, rewards: Tensor, n: int) -> Tensor:
    """The tokens [P, L] of the best of n images of each prompt: tokens [P * n, L], rewards [P * n]."""
    best = rewards.view(-1, n).argmax(1)
    return tokens.unflatten(0, (-1, n))[torch.arange(len(best), device=tokens.device), best.to(tokens.device)]


def finetune(
    *,
    out: Annotated[Path, Option()],  # without Option typer would take it by its place
    model: str = "embedded",
    prompts: str | None = None,
    quality: str = "embedded",
    steps: str = "1-16",
    iterations: int = 30,
    images: int = 128,
    n: int = 4,
    micro_batch: int = 16,
    lr: float = 3e-5,
    clip_grad: float = 1.0,
    seed: int = 0,
    compile: bool = True,
    device: str = "cpu",
) -> Path:
    """Fine-tunes `model` on the best of its own images, drawn in its own number of steps, with its own guidance.

    Each iteration draws `images`, `n` of each prompt, keeps the one of the highest `quality`, masks it as at one step
    of a sampler of `steps` steps ("8", or "1-16"), and makes one update. -> OUT/model, sampled without guidance, which
    the images already have. Products are in bf16 where that is fast, as in `speedrl.training`. ValueError where n does
    not divide `images`.
    """
    settings, out, choices = dict(locals()), Path(out), step_choices(steps).tolist()
    least, most = choices[0], choices[-1]
    if n < 1 or images % n:
        raise ValueError(f"--n must divide --images, got {n} and {images}")
    student, score = start(model, prompts, device=device), load_quality(quality, device=device)
    if compile:
        compiled(student.teacher.transformer, student.transformer)
    teacher, optimizer, count = student.teacher, optimiser(student.transformer, lr=lr), images // n
    random = torch.Generator().manual_seed(seed)
    autocast = bf16_autocast(device)
    (out / "metrics.jsonl").unlink(missing_ok=True)
    for iteration in track(range(iterations), f"fine-tuning, seed {seed}, lr {lr:g}"):
        encoded, texts = student.draw(count, random)
        wanted = [text for text in texts for _ in range(n)]
        with autocast:  # seeds past those of evaluation: no image that is measured is also taught
            tokens, _ = draw(teacher, wanted, steps=teacher.steps, seed=1_000_000 + seed * 10_000 + iteration)
            rewards = score(decode(teacher, tokens), wanted)
        targets = best_of(tokens, rewards, n).clone()
        counts = torch.randint(least, most + 1, (count,), generator=random)
        state, masked, timestep = mask_again(targets, counts, random, mask_id=teacher.mask_id)
        loss = 0.0
        for index in torch.arange(count, device=device).split(micro_batch):
            with autocast:
                logits = logits_of(student.policy(index_prompts(encoded, index)), state[index], timestep[index])
                part = finetune_loss(logits, targets[index], masked[index]) * (len(index) / count)
            part.backward()
            loss += part.item()
        norm = update(optimizer, clip_grad=clip_grad)
        log(out, {"iteration": iteration + 1, "loss": loss, "reward": rewards.mean().item(), "grad_norm": norm})
    budget = {"images": iterations * images, "network_evaluations": iterations * (
        images * teacher.sampler.evaluations(teacher.steps) + count)}
    return save(student, out, settings=settings, budget=budget, steps=most)


if __name__ == "__main__":  # python -m experiments.alternatives.finetune --out FOLDER
    typer.run(in_one_line(finetune))
