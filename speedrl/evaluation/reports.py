"""What a run ends with: the trained model beside its base."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track

from speedrl.evaluation.figures import contact_sheet, save_image
from speedrl.evaluation.measuring import (
    has_step_policy,
    judge_if_there,
    nfe_of,
    one_cell,
    prompt_sets,
    table,
)
from speedrl.generation import draw, make_policy, step_counts
from speedrl.models.generator import Generator, decode
from speedrl.models.loading import load_generator
from speedrl.rewards.loading import load_qualities
from speedrl.system.files import write_json

if TYPE_CHECKING:
    from PIL import Image

COMPARED_STEPS = (4, 8, 16)
BEFORE, SEARCHED, AFTER = "base", "base, its sampler searched", "trained"


def report(
    base: str | Path | Generator,
    trained: str | Path,
    *,
    out: str | Path,
    prompts: str | Path | Sequence[str] | None = None,
    quality: Any = "embedded",
    reward_weights: Sequence[str] = (),
    some: int = 20,
    count: int = 2,
    seeds: int = 1,
    images: int = 6,
    compile: bool = False,
    device: str = "cpu",
    text_encoder: str | Path | None = None,
    size: str | tuple[int, int] | None = None,
    negative_prompt: str | None = None,
    micro_conds: str | Sequence[float] | None = None,
) -> list[dict]:
    """Compares a trained model with its base on the same prompts and noise; returns rows as `evaluate` does.

    Three models: the base at its own steps and guidance; the base with the trained model's sampler, that is its
    searched scalars, guidance and remasking, which need no training; and the trained model. The last two take the
    learned number of steps ("auto", for each prompt the same), or without a step policy the steps of training, and
    COMPARED_STEPS; rows of as many network evaluations stand beside each other. On the first `some` prompts of each
    set, `count` images of each for each of `seeds` seeds. `compile` acts on a GPU: on a processor it costs more than it
    saves here. Writes OUT/comparison.json and OUT/before_after.png, the three models on `images` held-out prompts, and
    prints the table.
    """
    out, console = Path(out), Console(markup=False, highlight=False)
    before = load_generator(base, device=device, text_encoder=text_encoder, size=size, negative=negative_prompt,
                            micro_conds=micro_conds)
    after = load_generator(str(trained), device=device)
    # sampled as the trained model is: by its searched scalars, step policy, guidance and so on
    searched = before._replace(sampler=after.sampler, steps=after.steps, step_policy=after.step_policy)
    if compile and device != "cpu":
        torch.compiler.reset()  # after the networks of a training the compiler would give up
        before.transformer.compile_blocks()
        after.transformer.compile_blocks()
    sets = {which: lines[:some] for which, lines in prompt_sets(prompts, None).items()}
    judge = judge_if_there(device, console)
    scores, _ = load_qualities(quality, device=device, weights=reward_weights)
    everything = [prompt for lines in sets.values() for prompt in lines]
    own = "auto" if has_step_policy(after) else after.steps
    learned = set(step_counts(after, make_policy(after, everything).prompts.pooled, own).tolist())
    counts = [own, *(n for n in COMPARED_STEPS if {n} != learned and n <= after.grid[0] * after.grid[1])]
    cells: list[tuple[str, Generator, int | str]] = [(BEFORE, before, before.steps)]
    cells += [(name, model, n) for n in counts for name, model in ((SEARCHED, searched), (AFTER, after))]
    rows = []
    for which, lines in sets.items():
        found: list[dict[str, Any]] = []
        for name, model, steps in track(cells, f"comparing, {which} prompts", console=console, transient=True):
            row = {"model": name, "prompts": which, "steps": steps} | model.sampler.settings()
            row |= one_cell(model, judge, scores, lines, which=which, steps=steps, count=count, seeds=seeds, warm=False)
            found.append(row)
        rows += sorted(found, key=lambda row: row["network_evaluations"])
        write_json(out / "comparison.json", rows)

    shown = [*sets.values()][-1][:images]  # held-out prompts, where there are some
    save_image(before_after(cells[:3], shown), out / "before_after.png")
    console.print(table(rows, width=console.width))
    console.print(f"wrote {out / 'before_after.png'} and {out / 'comparison.json'}", soft_wrap=True)
    return rows


def before_after(
    cells: Sequence[tuple[str, Generator, int | str]], prompts: list[str], *, seed: int = 0
) -> "Image.Image":
    """A contact sheet: a row for each named model in its steps, with the same prompts and noise, images of 128 px.

    Labels say the mean network evaluations of the images shown.
    """
    sheet, labels = [], []
    for name, model, steps in cells:
        tokens, taken = draw(model, prompts, steps=steps, seed=seed)
        nfe = nfe_of({"network_evaluations": model.sampler.evaluations(1) * taken.double().mean().item()})
        sheet.append(decode(model, tokens).cpu())
        labels.append(f"{name}: {nfe} network evaluation{'s' * (float(nfe) > 1)}")
    return contact_sheet(sheet, labels=labels, titles=prompts, scale=math.ceil(128 / min(sheet[0].shape[-2:])))
