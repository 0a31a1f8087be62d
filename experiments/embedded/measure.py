"""What the tokenizer and the reward can do, on real pictures: `python -m experiments.embedded.measure`."""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from typer import Option

from experiments.embedded import build_judge, compose, data, train_clip
from speedrl.cli import in_one_line
from speedrl.evaluation import judging as judge
from speedrl.system.files import write_json
from speedrl.system.platform import quiet_allocator


def reconstructions(
    sprites: np.ndarray, names: list[str], centres: torch.Tensor, model: Path, *, seed: int = 0
) -> dict:
    """The judge's recall of one picture of each concept, before and after the tokenizer, per design and size."""
    rng, found = np.random.default_rng(seed), {}
    judged, concepts = judge.load_judge(model / "judge"), [(name,) for name in names]
    for style, label in enumerate(compose.STYLES):
        for size in (compose.BIG, compose.SMALL):
            drawn = [build_judge.draw_of(rng, thing, style=style, size=size) for thing in range(len(names))]
            real = torch.from_numpy(np.stack([compose.paint(picture, sprites) for picture in drawn]))
            again = train_clip.decoded(train_clip.tokens_of(real, centres), model / "vqvae")
            for kind, pictures in (("real", real), ("reconstructed", again)):
                features = judge.features(judged, pictures.permute(0, 3, 1, 2) / 255)
                first, five = judge.recall(judged, features, concepts)
                recalls = {"r1": float(first.float().mean()), "r5": float(five.float().mean())}
                found[f"{label} {size} px, {kind}"] = recalls
    return found


def main(
    *,
    cache: Annotated[Path, Option(help="Where packages and pictures stay.")] = Path("runs/rebuild"),
    model: Annotated[Path, Option(help="The generator's folder.")] = data.EMBEDDED,
) -> None:
    """Measure the embedded model's tokenizer and reward, after a rebuild in CACHE; writes CACHE/parts.json."""
    quiet_allocator()
    data.fetch(cache / "packages")
    listed, sprites = data.sprites(cache / "packages", data.TRAIN_VENDORS, cache / "train.npz")
    names, tags = [concept["name"] for concept in listed], [concept["tags"] for concept in listed]
    centres = torch.load(cache / "centres.pt", weights_only=True)
    parts = {
        "tokenizer": reconstructions(sprites, names, centres, model),
        "reward": train_clip.report(sprites, names, tags, model / "vqvae", centres, model / "reward"),
    }
    write_json(cache / "parts.json", parts)
    print(json.dumps(parts, indent=2))


if __name__ == "__main__":
    typer.run(in_one_line(main))
