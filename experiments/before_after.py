"""The first image of README.md: `python -m experiments.before_after --model RUN` draws random held-out prompts.

Three rows from the same noise: the base in its own steps, the base with the trained model's sampler, and the trained
model, the last two in the steps that the trained model takes. The prompts are drawn from all held-out ones by --seed,
which is printed for the caption. No image is chosen by hand.
"""

import random
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from speedrl.cli import in_one_line
from speedrl.evaluation.figures import save_image
from speedrl.evaluation.measuring import has_step_policy, prompt_sets
from speedrl.evaluation.reports import AFTER, BEFORE, SEARCHED, before_after
from speedrl.models.loading import load_generator


def main(
    *,
    model: Annotated[str, Option(help="The trained model: a run's folder.")],
    base: Annotated[str, Option(help="The model that it was trained from.")] = "embedded",
    steps: Annotated[int | None, Option(help="Steps of the last two rows. [default: the model's choice]")] = None,
    prompts: Annotated[str | None, Option(help="Prompts to draw from. [default: the embedded held-out ones]")] = None,
    count: Annotated[int, Option(help="Number of prompts.")] = 6,
    seed: Annotated[int, Option(help="Of the choice of prompts, and of the images.")] = 0,
    out: Annotated[Path, Option(help="The file to write: .png, .jpg or .webp.")] = Path("before_after.png"),
    device: Annotated[str, Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Draw random prompts by the base, by the base with the trained model's sampler, and by the trained model."""
    every = [*prompt_sets(prompts, None).values()][-1]
    shown = random.Random(seed).sample(every, min(count, len(every)))
    before, after = load_generator(base, device=device), load_generator(model, device=device)
    few = steps or ("auto" if has_step_policy(model) else after.steps)
    searched = before._replace(sampler=after.sampler, step_policy=after.step_policy)
    cells = [(BEFORE, before, before.steps), (SEARCHED, searched, few), (AFTER, after, few)]
    save_image(before_after(cells, shown, seed=seed), out)
    print(f"wrote {out}: {len(shown)} of {len(every)} prompts, drawn at random with seed {seed}")


if __name__ == "__main__":
    typer.run(in_one_line(main))
