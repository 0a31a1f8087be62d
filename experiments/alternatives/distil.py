"""One-step distillation in the manner of Di[M]O (Zhu et al., arXiv 2503.15457).

The student draws a whole image in one network evaluation, from nothing but masks; Di[M]O starts from random tokens in
part. Its image is masked again; at the masked positions the guided teacher and an auxiliary model, which is trained to
predict the student's own images, say what they expect there. Where they differ, the student's logits are pushed along
the difference.
"""

import copy
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from torch import Tensor
from typer import Option

from experiments.alternatives.shared import (
    Student,
    compiled,
    log,
    logits_of,
    mask_again,
    optimiser,
    save,
    start,
    update,
)
from speedrl.cli import in_one_line
from speedrl.method.likelihoods import sample_tokens
from speedrl.method.sampling import draw_noise
from speedrl.models.generator import Prompts, index_prompts
from speedrl.system.platform import bf16_autocast


def divergence_gradient(teacher_logits: Tensor, auxiliary_logits: Tensor, *, beta: float = -0.2) -> Tensor:
    """Gradient of (1 - beta) KL(teacher || auxiliary) + beta KL(auxiliary || teacher) in the auxiliary's logits.

    logits [..., V] twice -> float32 [..., V], of sum 0 over V. Di[M]O's generalised Jeffreys divergence, with its value
    of beta: that under 0 keeps the student diverse.
    """
    log_p, log_q = teacher_logits.float().log_softmax(-1), auxiliary_logits.float().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    ratio = log_q - log_p
    reverse = q * (ratio - (q * ratio).sum(-1, keepdim=True))
    return (1 - beta) * (q - p) + beta * reverse


def student_loss(logits: Tensor, gradient: Tensor, masked: Tensor) -> Tensor:
    """A scalar whose gradient in `logits` [B, L, V] is `gradient` at masked positions, a masked token on average."""
    return (logits.float() * gradient.detach() * masked[..., None]).sum() / masked.sum()


def auxiliary_loss(logits: Tensor, student_logits: Tensor, masked: Tensor) -> Tensor:
    """Cross-entropy in nats of the auxiliary's logits with the student's distribution, a masked token on average.

    That distribution in place of the tokens drawn from it has the same expected gradient with less noise.
    """
    target = student_logits.detach().float().softmax(-1)
    return -((target * logits.float().log_softmax(-1)).sum(-1) * masked).sum() / masked.sum()


def one_step(student: Student, prompts: Prompts, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The student's logits [B, L, V] at nothing but masks, and the tokens int64 [B, L] it draws by uniform [B, L]."""
    nothing = torch.full_like(uniform, student.teacher.mask_id, dtype=torch.int64)
    logits = logits_of(student.policy(prompts), nothing, torch.zeros_like(nothing[:, 0]))
    tokens, _ = sample_tokens(logits.detach(), uniform)
    return logits, tokens


def distil(
    *,
    out: Annotated[Path, Option()],  # without Option typer would take it by its place
    model: str = "embedded",
    prompts: str | None = None,
    guidance: float | None = None,
    beta: float = -0.2,
    iterations: int = 30,
    images: int = 128,
    micro_batch: int = 16,
    lr: float = 3e-5,
    clip_grad: float = 1.0,
    seed: int = 0,
    compile: bool = True,
    device: str = "cpu",
) -> Path:
    """Distils `model` into a generator of one step.

    Each iteration the student draws `images` and makes one update, and so does the auxiliary model on the same
    images, masked anew. `guidance` is the teacher's, by default its own. -> OUT/model, which is sampled in one step
    without guidance. Products are in bf16 where that is fast, as in `speedrl.training`.
    """
    settings, out = dict(locals()), Path(out)
    student = start(model, prompts, device=device)
    teacher, auxiliary = student.teacher, copy.deepcopy(student.transformer)
    if compile:
        compiled(teacher.transformer, student.transformer, auxiliary)
    optimizer, own = optimiser(student.transformer, lr=lr), optimiser(auxiliary, lr=lr)
    sampler = teacher.sampler.replace(guidance=guidance)
    random = torch.Generator().manual_seed(seed)
    autocast = bf16_autocast(device)
    (out / "metrics.jsonl").unlink(missing_ok=True)
    for iteration in track(range(iterations), f"distilling, seed {seed}, lr {lr:g}"):
        encoded, _ = student.draw(images, random)
        first = 1_000_000 + iteration * images  # past the noise that evaluation draws
        noise = draw_noise(images, 1, student.length, seed=seed, first=first, device=device)
        totals = {"gradient": 0.0, "auxiliary_loss": 0.0}
        for index in torch.arange(images, device=device).split(micro_batch):
            part, share = index_prompts(encoded, index), len(index) / images
            with autocast:
                logits, tokens = one_step(student, part, noise.uniform[index, 0])

            # the student follows the teacher away from what the auxiliary model knows of it
            state, masked, timestep = mask_again(tokens, teacher.steps, random, mask_id=teacher.mask_id)
            with torch.no_grad(), autocast:
                guided = student.policy(part, of=teacher.transformer, guidance=sampler.guidance)
                wanted = logits_of(guided, state, timestep)
                known = logits_of(student.policy(part, of=auxiliary), state, timestep)
            away = divergence_gradient(wanted, known, beta=beta)
            (student_loss(logits, away, masked) * share).backward()
            totals["gradient"] += (away.norm(dim=-1) * masked).sum().item() / masked.sum().item() * share

            # the auxiliary model follows the student
            state, masked, timestep = mask_again(tokens, teacher.steps, random, mask_id=teacher.mask_id)
            with autocast:
                found = logits_of(student.policy(part, of=auxiliary), state, timestep)
            loss = auxiliary_loss(found, logits, masked) * share
            loss.backward()
            totals["auxiliary_loss"] += loss.item()
        norm = update(optimizer, clip_grad=clip_grad)
        update(own, clip_grad=clip_grad)
        log(out, {"iteration": iteration + 1, "grad_norm": norm} | totals)
    seen = iterations * images
    budget = {"images": seen, "network_evaluations": seen * (3 + sampler.evaluations(1))}
    return save(student, out, settings=settings, budget=budget, steps=1)


if __name__ == "__main__":  # python -m experiments.alternatives.distil --out FOLDER
    typer.run(in_one_line(distil))
