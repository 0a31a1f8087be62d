"""What fine-tuning and distillation share: the student, its prompts and states, its update, and how it is saved."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from speedrl.generation import Policy
from speedrl.learner import draw_prompts, training_prompts
from speedrl.models.generator import Generator, Prompts, encode_prompts, index_prompts
from speedrl.models.loading import load_generator, save_generator
from speedrl.run.checkpoints import to_jsonable
from speedrl.system.files import append_lines, write_json


class Student(NamedTuple):
    """A copy of the teacher that trains, and all prompts encoded."""

    teacher: Generator  # frozen
    transformer: nn.Module  # the student's
    prompts: Prompts  # of all texts
    texts: list[str]
    empty: Prompts  # of one, what guidance leads away from

    @property
    def length(self) -> int:
        return self.teacher.grid[0] * self.teacher.grid[1]

    def draw(self, count: int, random: torch.Generator) -> tuple[Prompts, list[str]]:
        """`count` prompts at random, no two the same where there are as many: encoded, and their texts."""
        chosen = draw_prompts(len(self.texts), count, random)
        index = torch.tensor(chosen, device=self.prompts.text.device)
        return index_prompts(self.prompts, index), [self.texts[i] for i in chosen]

    def policy(self, prompts: Prompts, *, of: nn.Module | None = None, guidance: float = 1.0) -> Policy:
        """The policy of the student's transformer, or of another network, for encoded prompts."""
        return Policy(self.transformer if of is None else of, prompts, self.empty, guidance, self.teacher.grid,
                      self.teacher.mask_id)


def logits_of(policy: Callable[..., Tensor], tokens: Tensor, timestep: Tensor) -> Tensor:
    """Logits at every position of states int64 [B, L] at timesteps int64 [B]: [B, L, V]."""
    batch, length = tokens.shape
    everywhere = torch.arange(length, device=tokens.device).expand(batch, -1)
    return policy(tokens, timestep, torch.arange(batch, device=tokens.device), everywhere)


def mask_again(
    tokens: Tensor, steps: Tensor | int, random: torch.Generator, *, mask_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """States that samplers of so many steps see: int64 [B, L], steps int64 [B] or one number for all -> (masked tokens,
    masked bool [B, L], timestep int64 [B]).

    A cosine-distributed share is masked, at random positions, with the timestep of the step that has such a share.
    """
    batch, length = tokens.shape
    progress = torch.rand(batch, generator=random)
    count = (torch.cos(progress * math.pi / 2) * length).ceil().clamp(1, length)
    masked = torch.rand(batch, length, generator=random).argsort(-1).argsort(-1) < count[:, None]
    timestep = (steps - 1 - (progress * steps).floor()).long()
    masked, timestep = masked.to(tokens.device), timestep.to(tokens.device)
    return torch.where(masked, mask_id, tokens), masked, timestep


def start(model: str, prompts: str | Path | None, *, device: str) -> Student:
    """The teacher `model` and a student that starts as its copy. `prompts` None are the embedded model's."""
    teacher = load_generator(model, device=device)
    transformer = copy.deepcopy(teacher.transformer)
    teacher.transformer.requires_grad_(False)
    texts = list(training_prompts(model, prompts))
    return Student(
        teacher, transformer, encode_prompts(teacher, texts), texts, encode_prompts(teacher, [teacher.negative])
    )


def compiled(*networks: nn.Module) -> None:
    """Compiles the blocks of the networks of one training."""
    torch.compiler.reset()  # after those of a few trainings the compiler would give up
    for network in networks:
        network.compile_blocks()


def optimiser(transformer: nn.Module, *, lr: float) -> torch.optim.Optimizer:
    """That of `speedrl.training`, with a rate of its own, which is tuned."""
    return torch.optim.AdamW(transformer.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def update(optimizer: torch.optim.Optimizer, *, clip_grad: float) -> float:
    """One step along the clipped gradient; returns its norm before clipping."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip_grad, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def log(out: Path, row: dict) -> None:
    """Appends a line to OUT/metrics.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    append_lines(out / "metrics.jsonl", [json.dumps(row) + "\n"])


def save(student: Student, out: Path, *, settings: dict, budget: dict, steps: int) -> Path:
    """Writes OUT/model, sampled without guidance in `steps` steps, and OUT/budget.json: what it was trained with."""
    write_json(out / "budget.json", to_jsonable(settings) | budget)
    sampler = student.teacher.sampler.replace(guidance=1.0)
    save_generator(student.teacher._replace(transformer=student.transformer, steps=steps, sampler=sampler),
                   out / "model")
    return out / "model"
