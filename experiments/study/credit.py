"""What a step's credit does to the gradient: `python -m experiments.study.credit`.

At one parameter vector, over many batches of rollouts that all kinds of credit see: how noisy the gradient of the token
likelihood is, and what a step along its mean over batches does to the reward. The step is measured on other rollouts,
of the same prompts and noise before and after it:

    token        the reward's slope at the token, less what the policy expects of it (`critic`), if there is one
    rollout      every step has the advantage of its whole rollout (GRPO)
    lambda 1     that advantage above the state's value, and lambda 0 what the step alone changed of it (`value`)
    state        what lambda 1 takes away: the value in the place of the advantage. It tells nothing of any action, so
                 it should change nothing. Where the likeliest tokens are revealed, it does: compare `--order random`.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from torch import Tensor, nn
from typer import Option

from experiments.study.gradients import Batch, draw, gradient, write
from speedrl.cli import in_one_line
from speedrl.method.advantages import group_advantages
from speedrl.method.critic import reward_slopes
from speedrl.models.checkpoint import Generator, codebook, decode, decode_embeddings, fitting_batch, load_generator
from speedrl.rewards.loading import Score, differentiable, load_quality
from speedrl.training import training_prompts
from speedrl.value import guesses, step_credit


def credits(generator: Generator, batch: Batch, score: Score, fit: Tensor, *, group_size: int) -> tuple[dict, Tensor]:
    """Advantages [B, S] by kind of credit, all in standard deviations of the batch's rewards, and the fit of values."""
    device = batch.rewards.device
    guessed = guesses(
        batch.rollout, batch.texts, lambda tokens, texts: score(decode(generator, tokens), texts).to(device)
    )
    kinds = {  # where guesses tell nothing, all values are 0
        "rollout": (torch.zeros_like(guessed), 1.0),
        "lambda 1": (guessed, 1.0),
        "lambda 0": (guessed, 0.0),
    }
    found = {}
    for name, (told, gae_lambda) in kinds.items():
        found[name], after = step_credit(
            batch.rollout, told, batch.rewards, batch.rewards, fit, mine=slice(None), group_size=group_size,
            gae_lambda=gae_lambda, steps_reward=0.0, max_steps=guessed.shape[1],
        )  # fmt: skip
    return found | {"state": found["rollout"] - found["lambda 1"]}, after


def slopes_of(generator: Generator, batch: Batch, score: Score, codes: Tensor, *, group_size: int) -> Tensor:
    """Slopes [B, L, C] of the batch's rewards, in their standard deviations within groups."""

    def reward(embeddings: Tensor, texts: list[str]) -> Tensor:
        return score(decode_embeddings(generator, embeddings), texts)

    above = group_advantages(batch.rewards.view(-1, group_size), scale=False)
    at_once = fitting_batch(generator)
    found = reward_slopes(batch.rollout.tokens, codes, reward, batch.texts, batch=at_once)
    return found / (above.square().mean().sqrt() + 1e-4)


@torch.no_grad()
def move(network: nn.Module, along: Tensor, size: float) -> None:
    """Adds `size` times `along`, float32 [P], to the P parameters, in place."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    for p, part in zip(parameters, along.split([p.numel() for p in parameters]), strict=True):
        p += size * part.view_as(p)


def study(
    generator: Generator,
    texts: list[str],
    score: Score,
    *,
    batches: int = 12,
    test_batches: int = 6,
    lengths: tuple[float, ...] = (0.05, 0.1, 0.2),
    groups: int = 8,
    group_size: int = 8,
    steps: str = "4",
    guidance: float = 1.0,
    order: str = "confidence",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row for each kind of credit.

    norm_squared: of one batch's gradient. signal: of its mean, the part of the variance taken off (mean product of two
    different batches). noise_to_signal: of one batch, None where there is no signal. gain_S and its standard error:
    change of the mean reward by a step of length S along the mean gradient, down the loss, over test_batches of
    rollouts. Lengths are comparable: the networks' parameters are the same.
    """
    if batches < 2:
        raise ValueError("a variance needs at least 2 batches")
    settings = {"guidance": guidance, "order": order}
    drawn = settings | {"steps": steps, "groups": groups, "group_size": group_size, "seed": seed,
                        "temperature": generator.temperature}  # fmt: skip
    fit, totals, squares = torch.zeros(3, 4, dtype=torch.float64), {}, {}
    codes = (
        codebook(generator) if differentiable(score, device=next(generator.transformer.parameters()).device) else None
    )
    for number in track(range(batches), "gradients"):
        batch = draw(generator, texts, score, number=number, **drawn)
        found, fit = credits(generator, batch, score, fit, group_size=group_size)
        if codes is not None:
            found = {"token": torch.zeros_like(found["rollout"])} | found  # slopes alone
        for name, advantages in found.items():
            slopes = slopes_of(generator, batch, score, codes, group_size=group_size) if name == "token" else None
            one = gradient(generator, None, batch._replace(advantages=advantages), "token", slopes=slopes, **settings)
            totals[name] = totals.get(name, 0) + one
            squares[name] = squares.get(name, 0.0) + one.square().sum().item()

    def rewards() -> Tensor:
        """Mean reward of each group of the test batches."""
        parts = [draw(generator, texts, score, number=batches + k, **drawn).rewards for k in range(test_batches)]
        return torch.cat(parts).view(-1, group_size).mean(1)

    before, found = rewards(), []
    for name, total in track(totals.items(), "steps along them"):
        signal = (total.square().sum().item() - squares[name]) / (batches * (batches - 1))
        row = {"credit": name, "norm_squared": squares[name] / batches, "signal": signal,
               "noise_to_signal": (squares[name] / batches - signal) / signal if signal > 0 else None}  # fmt: skip
        along = total / total.norm()
        for length in lengths:
            move(generator.transformer, along, -length)
            change = rewards() - before
            move(generator.transformer, along, length)
            row |= {
                f"gain_{length:g}": change.mean().item(),
                f"error_{length:g}": (change.std() / len(change) ** 0.5).item(),
            }
        found.append(row)
    return found


def in_words(found: list[dict[str, Any]]) -> list[str]:
    """Each kind of credit beside the rollout's, in numbers."""
    (whole,) = (row["norm_squared"] for row in found if row["credit"] == "rollout")
    gains = [name for name in found[0] if name.startswith("gain_")]
    return [
        f"{row['credit']}: {row['norm_squared'] / whole:.2g} of the rollout's squared norm; reward "
        + ", ".join(
            f"{row[name]:+.3f} ± {row[name.replace('gain', 'error')]:.3f} by {name.removeprefix('gain_')}"
            for name in gains
        )
        + " along its mean."
        for row in found
    ]


def main(
    *,
    model: Annotated[str, Option(help="The policy.")] = "embedded",
    out: Annotated[Path, Option(help="Where the results go.")] = Path("runs/credit"),
    prompts: Annotated[str | None, Option(help="File of prompts. [default: the embedded model's]")] = None,
    quality: Annotated[str, Option(help="As of speedrl train.")] = "embedded",
    steps: Annotated[str, Option(help="Steps of the rollouts: 4, or 2-16.")] = "4",
    guidance: Annotated[float, Option(help="Guidance of the rollouts.")] = 1.0,
    order: Annotated[str, Option(help="Reveal order of the rollouts: confidence, random or halton.")] = "confidence",
    batches: Annotated[int, Option(help="Batches whose gradients are compared.")] = 12,
    test_batches: Annotated[int, Option(help="Batches that a step along them is measured on.")] = 6,
    groups: Annotated[int, Option(help="Prompts of a batch.")] = 8,
    group_size: Annotated[int, Option(help="Pictures of a prompt.")] = 8,
    seed: Annotated[int, Option(help="Of prompts and noise.")] = 0,
    device: Annotated[str, Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Measure what the credit of each step does to the gradient and to the reward."""
    generator = load_generator(model, device=device)
    texts = list(training_prompts(model, prompts))
    found = study(
        generator, texts, load_quality(quality, device=device), batches=batches, test_batches=test_batches,
        groups=groups, group_size=group_size, steps=steps, guidance=guidance, order=order, seed=seed,
    )  # fmt: skip
    about = {"model": model, "order": order, "steps": steps, "batches": batches, "seed": seed}
    write(out, "credit", "What the credit of tokens and steps does", found, in_words(found), about)


if __name__ == "__main__":
    typer.run(in_one_line(main))
