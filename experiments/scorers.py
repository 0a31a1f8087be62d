"""Our scores against the packages' own calls, speed and memory: `python -m experiments.scorers`.

In the environment of `just parity`, with random weights at the real size. Every measurement is a process of its own, so
that its peak of memory is its own; the packages score through their public functions on PIL images of one prompt,
ours a tensor of the same images. CLIP's package is open_clip, as its own documentation calls it.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from typer import Option

from speedrl.cli import in_one_line
from speedrl.system.files import write_atomically, write_json
from tests import reference
from tests.reference import pictures, tensors

PROMPT = "a red cat on a mat"


def weights(name: str, folder: Path) -> Path:
    """Random weights at the real size, made once."""
    path = folder / f"{name}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        state = getattr(reference, f"{name}_weights")(folder)
        write_atomically(path, lambda partial: torch.save(state, partial))
    return path


def scorer(name: str, whose: str, path: Path):
    """A function of PIL images, as the packages are called; ours takes their tensors, in float32 or as it comes."""
    if whose != "package":
        from speedrl.rewards import scorers

        load = partial(scorers.clip_score, reference.CLIP) if name == "clip" else getattr(scorers, f"{name}_score")
        score = load(weights=str(path), bf16=False if whose == "ours in fp32" else None)
        return lambda images: score(tensors(images), [PROMPT] * len(images))
    if name == "clip":
        return reference.open_clip_score(path, PROMPT)
    if name == "imagereward":
        package = reference.image_reward(path.parent / "vocab.txt")
        model = package.load(str(path), device="cpu", med_config=str(path.parent / "med_config.json"))
        return lambda images: torch.tensor(model.score(PROMPT, images))
    module = reference.hpsv2()
    from hpsv2.src.open_clip import create_model_and_transforms

    model, _, preprocess = create_model_and_transforms(
        "ViT-H-14", None, precision="fp32", light_augmentation=True, output_dict=True
    )
    module.model_dict |= {"model": model, "preprocess_val": preprocess}
    return lambda images: torch.tensor([float(value) for value in module.score(images, PROMPT, cp=str(path))])


@torch.no_grad()
def measure(name: str, whose: str, path: Path, *, batch: int, repeats: int) -> dict:
    """Median images a second after a first call, and the process's peak of memory."""
    score, images = scorer(name, whose, path), (pictures(224, 224) * batch)[:batch]
    score(images[:1])
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        score(images)
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"images_per_second": batch / statistics.median(seconds), "peak_gb": peak}


def main(
    *,
    cache: Annotated[Path, Option(help="Where the random weights stay.")] = Path("runs/scorers"),
    out: Annotated[Path, Option(help="The results, JSON.")] = Path("runs/scorers/scorers.json"),
    batch: Annotated[int, Option(help="Images of one call.")] = 8,
    repeats: Annotated[int, Option(help="Calls, of which the median counts.")] = 3,
    one: Annotated[str | None, Option(hidden=True)] = None,
) -> None:
    """Measure ImageReward, HPSv2.1 and CLIP ViT-L-14, ours and the packages'."""
    if one:  # the process of one measurement
        name, whose = one.split(":")
        print(json.dumps(measure(name, whose, weights(name, cache), batch=batch, repeats=repeats)))
        return
    rows, console = [], Console()
    for name in ("imagereward", "hpsv2", "clip"):
        for whose in ("package", "ours in fp32", "ours"):
            command = ["--one", f"{name}:{whose}", "--cache", str(cache), "--batch", str(batch)]
            with console.status(f"{name}, {whose}"):
                done = subprocess.run(
                    [sys.executable, "-m", "experiments.scorers", *command, "--repeats", str(repeats)],
                    check=True, stdout=subprocess.PIPE, encoding="utf-8",
                )
            rows.append({"reward": name, "whose": whose} | json.loads(done.stdout.splitlines()[-1]))
    table = Table("reward", "whose", "images/s", "times the package's", "peak GB")
    for row in rows:
        package = next(r for r in rows if r["reward"] == row["reward"] and r["whose"] == "package")
        row["ratio"] = row["images_per_second"] / package["images_per_second"]
        table.add_row(
            row["reward"], row["whose"], *(f"{row[key]:.2f}" for key in ("images_per_second", "ratio", "peak_gb"))
        )
    console.print(table)
    write_json(out, {"batch": batch, "repeats": repeats, "rows": rows})


if __name__ == "__main__":
    typer.run(in_one_line(main))
