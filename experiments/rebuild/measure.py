"""What the embedded model's parts can do: `python -m experiments.rebuild.measure`.

The tokenizer: PSNR of its reconstructions, and the judge's R@1 on them beside real images. The base: the judge's R@1 on
the evaluation prompts, with guidance and temperature searched on training prompts, and a sheet of random prompts.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor
from typer import Option

from experiments.rebuild import compose, data, train_clip
from experiments.rebuild.train_vq import images_of, load_tokens, load_vqmodel, tokens_of
from speedrl.cli import in_one_line
from speedrl.evaluation import judging as judge
from speedrl.evaluation.figures import contact_sheet
from speedrl.generation import sample
from speedrl.models.checkpoint import load_generator
from speedrl.system.files import write_json
from speedrl.system.platform import bf16_is_fast, quiet_allocator

DTYPE = torch.bfloat16 if bf16_is_fast("cpu") else torch.float32
# the first are tried first; at low temperatures a base that is trained little fills images with their ground
SEARCHED = {"guidance": (1.5, 1.0, 2.5), "temperature": (4.0, 1.0, 10.0), "revise": (0.0, 0.5)}


def recall(judged: judge.Judge, images: Tensor, concepts: list[tuple[str, ...]]) -> float:
    """R@1 of images float32 [N, 3, 64, 64] in [0, 1]: the share whose nearest prototype is the concept's."""
    first, _ = judge.recall(judged, judge.features(judged, images), concepts)
    return float(first.float().mean())


def tokenizer(sprites: np.ndarray, names: list[str], vq: Path, judged: judge.Judge, *, seed: int = 1) -> dict:
    """PSNR and R@1 of one image of each concept in each design and size, before and after the tokenizer."""
    rng, found, errors = np.random.default_rng(seed), {}, []
    encoder, decoder = load_tokens(vq), load_vqmodel(vq)
    for style, size in itertools.product(range(len(compose.STYLES)), (compose.BIG, compose.SMALL)):
        contents = [
            compose.draw(rng, concepts=len(names))._replace(thing=thing, style=style) for thing in range(len(names))
        ]
        places = compose.places(size)
        contents = [c._replace(size=size, place=places[int(rng.integers(len(places)))]) for c in contents]
        real = torch.from_numpy(np.stack([compose.paint(content, sprites) for content in contents]))
        again = images_of(decoder, tokens_of(encoder, real))
        errors.append((real.float() - again.float()).square().mean((1, 2, 3)) / 255**2)
        r1 = [recall(judged, images.permute(0, 3, 1, 2) / 255, [(name,) for name in names]) for images in (real, again)]
        found[f"{compose.STYLES[style]} {size} px"] = {"real": r1[0], "reconstructed": r1[1]}
    means = {kind: float(np.mean([row[kind] for row in found.values()])) for kind in ("real", "reconstructed")}
    error = torch.cat(errors)
    return found | {
        "real": means["real"],
        "reconstructed": means["reconstructed"],
        "ratio": means["reconstructed"] / means["real"],
        "psnr": float(-10 * error.mean().log10()),
        "psnr of the median image": float(-10 * error.median().log10()),
    }


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def search(score: Callable[..., float]) -> tuple[dict[str, float], dict[str, float]]:
    """The options that `score` likes best, one searched after the other, and what each setting reached."""
    best = {name: values[0] for name, values in SEARCHED.items()}
    reached = {}
    for name, values in SEARCHED.items():
        scores = {}
        for value in values:
            options = best | {name: value}
            key = json.dumps(options)
            reached[key] = scores[value] = reached[key] if key in reached else score(**options)
        best[name] = max(scores, key=scores.__getitem__)
    return best, reached


def base(model: Path, judged: judge.Judge, *, steps: tuple[int, ...], searched: int, count: int) -> dict:
    """R@1 on the evaluation prompts with the sampler that `search` finds on `searched` training prompts.

    `count` images of each evaluation prompt. The ratio is to what real images of the same prompts reach.
    """
    generator = load_generator(model, dtype=DTYPE)
    prompts = {"seen": read_lines(model / "prompts/eval.txt"), "held-out": read_lines(model / "prompts/held_out.txt")}
    training = read_lines(model / "prompts/train.txt")[:searched]

    def r1(lines: list[str], seed: int, **options) -> float:
        images = sample(generator, lines, seed=seed, **options)
        return recall(judged, images, [judge.concepts_in(line, judged.names) for line in lines])

    found = {}
    for number in steps:
        options, tried = search(lambda number=number, **options: r1(training, 1, steps=number, **options))
        row: dict = {"sampler": options, "tried": tried}
        for which, lines in prompts.items():
            seeds = range(2, 2 + count)
            row[which] = float(np.mean([r1(lines, seed, steps=number, **options) for seed in seeds]))
            row[f"{which} ratio"] = row[which] / judged.real[which]["judge_r1"]
        found[f"{number} steps"] = row
        print(number, json.dumps(row), flush=True)
    return found


def sheet(model: Path, path: Path, *, count: int = 60, columns: int = 10, seed: int = 3, **options) -> list[str]:
    """Writes a sheet of one sample each of `count` random prompts, half of held-out concepts; returns the prompts."""
    rng, generator = np.random.default_rng(seed), load_generator(model, dtype=DTYPE)
    lists = [read_lines(model / f"prompts/{name}.txt") for name in ("eval", "held_out")]
    prompts = [str(line) for lines in lists for line in rng.permutation(lines)[: count // 2]]
    images = sample(generator, prompts, seed=seed, **options)
    contact_sheet(list(images.split(columns)), scale=2).save(path)
    return prompts


def main(
    *,
    cache: Annotated[Path, Option(help="Where packages and images stay.")] = Path("runs/rebuild"),
    model: Annotated[Path | None, Option(help="The generator's folder; by default CACHE/generator.")] = None,
    only_tokenizer: Annotated[bool, Option("--only-tokenizer", help="Measure nothing else.")] = False,
    searched: Annotated[int, Option(help="Training prompts of the sampler's search.")] = 96,
    count: Annotated[int, Option(help="Images of each evaluation prompt.")] = 2,
) -> None:
    """Measure the embedded model after a rebuild in CACHE; writes CACHE/parts.json and CACHE/sheet.png."""
    quiet_allocator()
    model = model or cache / "generator"
    concepts, sprites = data.sprites(cache / "packages", data.TRAIN_VENDORS, cache / "train.npz")
    names, tags = [concept["name"] for concept in concepts], [concept["tags"] for concept in concepts]
    judged = judge.load_judge(model / "judge")
    concepts_of_judge = len(judged.names)
    sprites, names, tags = sprites[:concepts_of_judge], names[:concepts_of_judge], tags[:concepts_of_judge]
    parts = {"tokenizer": tokenizer(sprites, names, cache / "vq", judged)}
    print(json.dumps(parts, indent=1), flush=True)
    if only_tokenizer:
        return
    parts["real"] = judged.real
    parts["base"] = base(model, judged, steps=(8, 32), searched=searched, count=count)
    options = parts["base"]["32 steps"]["sampler"]
    parts["sheet"] = sheet(model, cache / "sheet.png", steps=32, **options)
    if (model / "reward").exists():
        parts["reward"] = train_clip.report(sprites, names, tags, cache / "vq", model / "reward")
    write_json(cache / "parts.json", parts)
    print(json.dumps({name: part for name, part in parts.items() if name != "sheet"}, indent=1))


if __name__ == "__main__":
    typer.run(in_one_line(main))
