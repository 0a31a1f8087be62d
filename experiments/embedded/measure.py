"""What the embedded model can do, for its card: `python -m experiments.embedded.measure`, then `.card`.

The tokenizer: the judge's R@1 on its reconstructions beside real images. The base: the sampler's settings, searched on
training prompts; curves over step counts on the evaluation prompts; what it should reach; a sheet of random prompts.
"""

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from PIL import Image
from rich.progress import track
from torch import Tensor, nn
from typer import Option

from experiments.embedded import compose, data, train_base, train_clip, train_vq
from experiments.embedded.train_vq import images_of, load_tokens, load_vqmodel, tokens_of
from speedrl.cli import in_one_line
from speedrl.evaluation import judging as judge
from speedrl.evaluation.figures import contact_sheet, save_image
from speedrl.evaluation.measuring import one_cell, plot
from speedrl.generation import sample
from speedrl.models.generator import Generator
from speedrl.models.loading import load_generator
from speedrl.models.sources import parts_of
from speedrl.rewards.loading import load_qualities
from speedrl.system.files import write_json
from speedrl.system.platform import bf16_is_fast, can_compile, quiet_allocator

# the first are tried first; at low temperatures a base that is trained little fills images with their ground
SEARCHED = {
    "temperature": (4.0, 0.5, 1.0, 2.0, 10.0),
    "guidance": (1.5, 1.0, 1.25, 2.0),
    "remask": (0.0, 0.25, 0.5, 0.75),
}
LISTS = {"search": "train", "training": "eval", "held-out": "held_out"}  # sets of prompts and their files
FEW, MANY = 8, 32  # steps
SHEET_SEED = 3


class Effort(NamedTuple):
    """How much of everything."""

    searched: int = 150  # training prompts of the search, one image each
    count: int = 4  # images of each evaluation prompt: real images' Fréchet distance is that of four
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    sheet: int = 60  # prompts
    searches: tuple[str, ...] = tuple(SEARCHED)
    compiled: bool = True


QUICK = Effort(searched=4, count=2, steps=(1, 8), sheet=10, searches=("guidance",), compiled=False)


class Cells:
    """Rows as of `evaluate`, by this model's own judge, reward and prompts. Those in the file `kept` are not computed
    again where the model's files are the same."""

    def __init__(self, model: Path, kept: Path, effort: Effort):
        reward, self.judge = model / "reward", judge.load_judge(model / "judge")
        self.generator = load_generator(model, dtype=torch.bfloat16 if bf16_is_fast("cpu") else torch.float32)
        if effort.compiled and can_compile("cpu"):
            self.generator.transformer.compile_blocks()
        self.scores = load_qualities(str(reward))[0] if reward.exists() else {}
        files = {which: model / f"prompts/{name}.txt" for which, name in LISTS.items()}
        self.prompts = {which: path.read_text(encoding="utf-8").splitlines() for which, path in files.items()}
        self.prompts["search"] = self.prompts["search"][: effort.searched]
        self.counts = {"search": 1, "training": effort.count, "held-out": effort.count}
        parts = [part for part in parts_of(model) if part.name != "scheduler"]  # settings are given to every row
        self.weights = fingerprint(*parts, model / "judge", model / "prompts", reward)
        self.kept, self.rows = kept, json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}

    def row(self, which: str, steps: int, **sampler: float) -> dict[str, Any]:
        """What the set of prompts `which` reaches in `steps` steps."""
        how = self.generator.sampler.settings() | sampler
        size = len(self.prompts[which]), self.counts[which]
        key = json.dumps([self.weights, which, *size, steps, how])
        if key not in self.rows:
            found = one_cell(
                self.generator, self.judge, self.scores, self.prompts[which], which=which, steps=steps,
                count=self.counts[which], seeds=1, warm=False, sampler=self.generator.sampler.replace(**sampler),
            )
            self.rows[key] = {"model": "base", "prompts": which, "steps": steps} | how | found
            write_json(self.kept, self.rows)
        return self.rows[key]


def fingerprint(*folders: Path) -> str:
    """Hash of the files in these folders: a model trained anew under its old name is another one."""
    digest = hashlib.sha256()
    for path in (path for folder in folders for path in sorted(folder.glob("*")) if path.is_file()):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


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
    return {
        "by_design": found,
        "real": means["real"],
        "reconstructed": means["reconstructed"],
        "ratio": ratio(means["reconstructed"], means["real"]),
        "psnr": float(-10 * error.mean().log10()),
        "psnr_median": float(-10 * error.median().log10()),
    }


def ratio(value: float, to: float) -> float | None:
    return value / to if to else None


def search(
    score: Callable[..., float], searched: tuple[str, ...], *, start: dict[str, float] | None = None, rounds: int = 2
) -> dict[str, float]:
    """The settings of SEARCHED that `score` likes best, one option after the other, in two rounds from `start`."""
    best = {name: values[0] for name, values in SEARCHED.items()} | (start or {})
    for name in searched * rounds:
        best[name] = max(SEARCHED[name], key=lambda value, name=name: score(**best | {name: value}))
    return best


def curves(cells: Cells, best: dict[str, float], steps: tuple[int, ...]) -> list[dict]:
    """Rows over step counts with and without guidance, with and without remasking, on both sets of prompts.

    "With" is what the search found, or where it found none a guidance of 1.5 and a share of 0.5."""
    with_guidance = best["guidance"] if best["guidance"] > 1 else SEARCHED["guidance"][0]
    remasked = best["remask"] or SEARCHED["remask"][2]
    wanted = itertools.product(("training", "held-out"), (with_guidance, 1.0), (0.0, remasked), steps)
    return [
        cells.row(which, s, temperature=best["temperature"], guidance=guidance, remask=remask)
        for which, guidance, remask, s in track([*wanted], "curves")
    ]


def targets(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """What the model should reach, what it does, and whether that is enough."""
    best, real = parts["best"], parts["real"]
    r1 = {(row["prompts"], row["steps"]): row["judge_r1"] for row in best}
    few, many = (r1["training", steps] + r1["held-out", steps] for steps in (FEW, MANY))
    found = [
        ("tokenizer, R@1 to that of real images", parts["tokenizer"]["ratio"], 0.9),
        *(
            (f"base, {MANY} steps, {which} prompts, R@1 to that of real images",
             ratio(r1[which, MANY], real[which]["judge_r1"]), target)
            for which, target in (("training", 0.85), ("held-out", 0.75))
        ),
        (f"base, best samplers, R@1 in {MANY} steps to that in {FEW}", ratio(many, few), 1.25),
    ]
    return [
        {"what": what, "value": value, "target": target, "met": value is not None and value >= target}
        for what, value, target in found
    ]


def sheet(cells: Cells, path: Path, *, count: int, steps: int, columns: int = 10, **sampler: float) -> list[str]:
    """Writes a sheet of one sample each of `count` random prompts, half of held-out concepts; returns the prompts."""
    rng, lists = np.random.default_rng(SHEET_SEED), (cells.prompts["training"], cells.prompts["held-out"])
    prompts = [str(line) for lines in lists for line in rng.permutation(lines)[: count // 2]]
    how = cells.generator.sampler.replace(**sampler)
    images = sample(cells.generator, prompts, seed=SHEET_SEED, steps=steps, sampler=how).split(columns)
    strips = [
        contact_sheet([row], titles=prompts[i * columns : (i + 1) * columns], scale=2) for i, row in enumerate(images)
    ]
    whole = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), "white")
    for i, strip in enumerate(strips):
        whole.paste(strip, (0, sum(above.height for above in strips[:i])))
    save_image(whole, path)
    return prompts


def parameters(generator: Generator) -> dict[str, int]:
    """Numbers of parameters of the parts that draw images."""
    vqvae = generator.vqvae
    parts = {
        "transformer": generator.transformer, "text encoder": generator.text_encoder, "codebook": vqvae.quantize,
        "decoder": nn.ModuleList([vqvae.post_quant_conv, vqvae.decoder]),
    }
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def main(
    *,
    cache: Annotated[Path, Option(help="Of the rebuild: packages, images, tokenizer.")] = Path("runs/rebuild"),
    model: Annotated[Path | None, Option(help="The generator's folder; by default CACHE/generator.")] = None,
    out: Annotated[Path | None, Option(help="Where the results go; by default CACHE/measured.")] = None,
    only_tokenizer: Annotated[bool, Option("--only-tokenizer", help="Measure nothing else.")] = False,
    quick: Annotated[bool, Option("--quick", help="Few prompts and steps: a test.")] = False,
) -> None:
    """Measure the embedded model after a rebuild in CACHE.

    Writes OUT/measured.json, OUT/curves.png and OUT/sheet.png; run it again after an interruption.
    """
    quiet_allocator()
    model, out, effort = model or cache / "generator", out or cache / "measured", QUICK if quick else Effort()
    concepts, sprites = data.sprites(cache / "packages", data.TRAIN_VENDORS, cache / "train.npz")
    judged = judge.load_judge(model / "judge")
    number = len(judged.names)
    sprites, concepts = sprites[:number], concepts[:number]
    names, tags = [concept["name"] for concept in concepts], [concept["tags"] for concept in concepts]
    parts: dict[str, Any] = {"tokenizer": tokenizer(sprites, names, cache / "vq", judged)}
    print(json.dumps(parts, indent=1), flush=True)
    if only_tokenizer:
        return
    cells = Cells(model, out / "rows.json", effort)
    parts |= {"concepts": number, "held_out": len(judged.held_out), "real": judged.real, "effort": effort._asdict(),
              "parameters": parameters(cells.generator), "sampler": {}, "best": [],
              "prompts": len(cells.prompts["training"]) + len(cells.prompts["held-out"])}
    parts["training"] = {part: train_vq.effort(cache / "vq", part) for part in ("tokens", "decoder")}
    if (cache / "base/state.pt").exists():
        parts["training"]["base"] = train_base.effort(cache / "base")
    best: dict[str, float] = {}
    for steps in (MANY, FEW):  # by the margin, as it tells settings apart with fewer images than R@1
        print(f"the sampler of {steps} steps", flush=True)
        own = search(  # few steps start from what is best in many
            lambda steps=steps, **how: cells.row("search", steps, **how)["judge_margin"], effort.searches, start=best
        )
        best = best or own
        parts["sampler"][f"{steps} steps"] = own
        parts["best"] += [cells.row(which, steps, **own) for which in ("training", "held-out")]
    parts["SAMPLING"] = {  # for train_base.SAMPLING
        "num_inference_steps": MANY, "guidance_scale": best["guidance"], "temperature": best["temperature"],
        "remask_share": best["remask"],
    }
    parts["targets"] = targets(parts)
    parts["sheet"] = {"seed": SHEET_SEED, "steps": MANY, "sampler": best}
    parts["sheet"]["prompts"] = sheet(cells, out / "sheet.png", count=effort.sheet, steps=MANY, **best)
    write_json(out / "measured.json", parts)
    parts["curves"] = curves(cells, best, effort.steps)
    plot(parts["curves"], out / "curves.png", real=judged.real)
    if (model / "reward").exists():
        parts["reward"] = train_clip.report(sprites, names, tags, cache / "vq", model / "reward")
    write_json(out / "measured.json", parts)
    print(json.dumps({name: parts[name] for name in ("sampler", "SAMPLING", "targets")}, indent=1))


if __name__ == "__main__":
    typer.run(in_one_line(main))
