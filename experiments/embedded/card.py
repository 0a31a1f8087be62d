"""The model card of the embedded model, from what was measured: `python -m experiments.embedded.card`.

Writes README.md, curves.png and sheet.png into the generator's folder, as a model's page on the hub has them.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from experiments.embedded import compose, data
from experiments.embedded.train_vq import GRID
from speedrl.cli import in_one_line
from speedrl.evaluation.measuring import columns_of
from speedrl.system.files import write_atomically

LICENCES = {
    "emojibase-data": ("names and tags", "MIT"),
    "@iconify-json/noto": ("images of all trainings", "Apache-2.0"),
    "@iconify-json/fluent-emoji-flat": ("images of all trainings", "MIT"),
    "@iconify-json/twemoji": ("the judge's prototypes only", "CC BY 4.0"),
    "@iconify-json/emojione": ("the judge's prototypes only", "CC BY 4.0"),
}
PARTS = {"tokens": "tokens: encoder and codebook", "decoder": "decoder of the tokens", "base": "transformer and text"}
CARD = """\
---
license: other
license_name: mit-apache-2.0-and-cc-by-4.0
language: en
pipeline_tag: text-to-image
tags:
- masked-image-modeling
- meissonic
- emoji
---

# The embedded model of speedrl

A small text-to-image generator for experiments with reinforcement learning of samplers. It draws {side}x{side} pixels
as {tokens} tokens, in parallel: a masked generative transformer of Meissonic's architecture. It was trained from random
weights.

An image shows one of {concepts} things, in one of two designs, on a plain background of one of {colours} colours. The
thing is {small} or {big} pixels large, at a place on a grid of {cell} pixels. A caption names the thing, and mostly
leaves the rest open. {held_out} of the things are held out: the base knows them, but no prompt of reinforcement
learning names them.

## Data and licences

The weights are under the MIT licence, as far as they are ours. The designs behind them are under the licences below,
and the judge's prototypes, which average features of designs, are under CC BY 4.0. Attributions are in speedrl's
NOTICE. No image is part of the model.

{data}

## Parts

{parameters}

Beside these, `reward/` is a small CLIP that was trained on the same images, `judge/` the prototypes, and `prompts/` the
lists of prompts.{reward}

## Training

Hours are by the clock, on two cores, pauses and other work beside them included.

{training}

## Results

R@1 is the share of images whose nearest prototype, in a judge's features, is that of the thing in the prompt. The
judge is an EfficientNet-Lite0 with ImageNet's weights. Its prototypes are of designs that no training saw. Real images
are those of the training designs that the prompts could mean.

{targets}

The samplers were searched on {searched} other training prompts, by the judge's margin. The rows below are of
{prompts} prompts, half of them held out, {count} images of each.

{best}

The best sampler: {sampling}.

### The tokenizer

One image of each thing, reconstructed: {psnr:.1f} dB.

{tokenizer}

### Over steps

With and without guidance and remasking. Remasking acts from 6 steps on. The grey lines are real images.

![Quality over network evaluations](curves.png)

<details><summary>The numbers</summary>

{curves}
</details>

### Random prompts

One image each of {sheet} random prompts, the first half of training concepts, the other half of held-out ones, in
{sheet_steps} steps. The seed is {seed}; nothing was selected.

![A sheet of random prompts](sheet.png)

## Limitations

- It knows {concepts} things and the words of its captions. What other words do is not defined.
- It draws one thing. It neither counts nor draws two things.
- Its images say nothing of photographs or of human preference. Results on it need not carry over to larger models.
- The judge recognises things. It sees neither design nor background nor place.
- The designs are others' work: see NOTICE before images are used elsewhere.
"""


def table(header: list[str], rows: list[list[str]], *, text: int = 1) -> str:
    """A table in Markdown, whose first `text` columns are text."""
    rule = ["---" if i < text else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def card(parts: dict[str, Any]) -> str:
    """The text of the card, of what `measure` wrote."""
    real, effort, sheet, tokens = parts["real"], parts["effort"], parts["sheet"], parts["tokenizer"]
    total = sum(parts["parameters"].values())
    header, lines = columns_of(parts["curves"])  # the last column is a time, which needs an idle machine
    trained = [[PARTS[part], f"{of['updates']:,}", f"{of['seconds'] / 3600:.1f}" if of["seconds"] else "–"]
               for part, of in parts["training"].items()]
    best = [[f"{row['prompts']}, {row['steps']} steps", f"{row['guidance']:g}", f"{row['temperature']:g}",
             f"{row['remask']:g}", number(row["judge_r1"]), number(real[row["prompts"]]["judge_r1"])]
            for row in parts["best"]]
    reconstructed = [
        *([design, number(of["real"]), number(of["reconstructed"])] for design, of in tokens["by_design"].items()),
        ["all", number(tokens["real"]), number(tokens["reconstructed"])],
    ]
    met, reward = {True: "yes", False: "no"}, ""
    if "reward" in parts:
        named = (f"{number(parts['reward'][domain]['r1'])} of {domain} images" for domain in ("real", "decoded"))
        reward = f" The reward names the thing in {' and '.join(named)}."
    return CARD.format(
        side=compose.SIDE, tokens=GRID**2, reward=reward,
        small=compose.SMALL, big=compose.BIG, cell=compose.CELL, colours=len(compose.COLOURS),
        concepts=parts["concepts"], held_out=parts["held_out"], psnr=tokens["psnr"],
        data=table(["package", "version", "used for", "licence"],
                   [[name, version, *LICENCES[name]] for name, version in data.PACKAGES.items()], text=4),
        parameters=table(["part", "parameters"], [[name, f"{size:,}"] for name, size in parts["parameters"].items()]
                         + [["all", f"{total:,}"]]),
        training=table(["part", "updates", "hours"], trained),
        targets=table(["what", "value", "target", "met"],
                      [[of["what"], number(of["value"]), f"{of['target']:g}", met[of["met"]]]
                       for of in parts["targets"]]),
        best=table(["prompts", "guidance", "temperature", "remask", "R@1", "R@1 of real images"], best),
        searched=effort["searched"], prompts=parts["prompts"], count=effort["count"],
        sampling=", ".join(f"{name} {value:g}" for name, value in parts["SAMPLING"].items()),
        tokenizer=table(["design and size", "R@1, real", "R@1, reconstructed"], reconstructed),
        curves=table(header[:-1], [line[:-1] for line in lines], text=2),
        sheet=len(sheet["prompts"]), sheet_steps=sheet["steps"], seed=sheet["seed"],
    )


def main(
    *,
    cache: Annotated[Path, Option(help="Of the rebuild.")] = Path("runs/rebuild"),
    model: Annotated[Path | None, Option(help="The generator's folder; by default CACHE/generator.")] = None,
    measured: Annotated[Path | None, Option(help="What measure wrote; by default CACHE/measured.")] = None,
) -> None:
    """Write the embedded model's card beside its weights."""
    model, measured = model or cache / "generator", measured or cache / "measured"
    text = card(json.loads((measured / "measured.json").read_text(encoding="utf-8")))
    write_atomically(model / "README.md", lambda partial: partial.write_text(text, encoding="utf-8"))
    for figure in ("curves.png", "sheet.png"):
        shutil.copy(measured / figure, model / figure)
    print(f"wrote {model / 'README.md'}")


if __name__ == "__main__":
    typer.run(in_one_line(main))
