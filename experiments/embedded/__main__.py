"""Rebuilds the embedded model from the packages that its images come from: `python -m experiments.embedded`.

Stages: packages, judge, tokens, base, decoder, reward. Each keeps what it has finished in the cache and goes on from
its last checkpoint, with fixed seeds: run it again after an interruption. README.md beside this file describes them.
"""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from typer import Option

from experiments.embedded import build_judge, compose, data, train_base, train_clip, train_vq
from speedrl.cli import in_one_line
from speedrl.system.files import write_atomically
from speedrl.system.platform import quiet_allocator


class Size(NamedTuple):
    """How much of everything."""

    concepts: int = 10_000  # at most
    tokenizer_images: int = 12_000
    token_steps: int = 8_000
    decoder_steps: int = 12_000
    tokenizer_batch: int = 32
    base_steps: int = 24_000
    base_decay: int = 24_000  # the last updates, in which the rate falls
    base_batch: int = 64
    reward_steps: int = 2_400
    reward_images: int = 12_000
    prompts: int = 640  # for reinforcement learning
    evaluated: int = 150  # prompts each of training and of held-out concepts


QUICK = Size(
    concepts=12, tokenizer_images=200, token_steps=60, decoder_steps=20, tokenizer_batch=8, base_steps=50,
    base_decay=20, base_batch=8, reward_steps=20, reward_images=300, prompts=30, evaluated=10,
)


def drawn_images(sprites: np.ndarray, path: Path, *, count: int, seed: int = 0) -> np.ndarray:
    """Composed images for the tokenizer, uint8 [count, 64, 64, 3], painted once and kept in `path`."""
    if not path.exists():
        rng = np.random.default_rng(seed)
        painted = [compose.paint(compose.draw(rng, concepts=len(sprites)), sprites) for _ in range(count)]

        def write(partial: Path) -> None:
            with partial.open("wb") as file:
                np.save(file, np.stack(painted))

        write_atomically(path, write)
    return np.load(path)


def train_base_on(cache: Path, size: Size, *, minutes: float, device: str, processes: int, quick: bool) -> int:
    """The base's training, in a process a core on the CPU; returns how many updates the weights have had."""
    base = cache / "base"
    if device != "cpu":
        train_base.train(
            train_base.read_pool(base), base, steps=size.base_steps, decay=size.base_decay, minutes=minutes,
            batch=size.base_batch, device=device,
        )
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        options = ["--only-base", "--cache", str(cache), "--base-steps", str(size.base_steps)]
        options += ["--base-decay", str(size.base_decay)]
        options += ["--minutes", str(minutes), *["--quick"] * quick]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        subprocess.run([*launcher, "-m", "experiments.embedded", *options], check=True, env=environment)
    return int(train_base.effort(base)["updates"])


def main(
    *,
    cache: Annotated[Path, Option(help="Where packages, images and checkpoints stay.")] = Path("runs/rebuild"),
    out: Annotated[Path | None, Option(help="The generator's folder; by default CACHE/generator.")] = None,
    quick: Annotated[bool, Option("--quick", help="All stages in two minutes, on a few concepts: a test.")] = False,
    base_steps: Annotated[int | None, Option(help="Updates of the base.")] = None,
    base_decay: Annotated[int | None, Option(help="The last of them, in which the learning rate falls.")] = None,
    minutes: Annotated[float, Option(help="Stop the base's training after so many, to go on another time.")] = math.inf,
    from_stage: Annotated[Path | None, Option(help="Go on from a stage's weights if the cache has none.")] = None,
    save_stage: Annotated[Path | None, Option(help="Write the base's weights to this folder, as a stage.")] = None,
    device: Annotated[str, Option(help="Where networks train: cpu, the base in a process a core, or cuda.")] = "cpu",
    processes: Annotated[int, Option(help="Processes of the base on the CPU.")] = os.cpu_count() or 1,
    only_base: Annotated[bool, Option("--only-base", hidden=True)] = False,
) -> None:
    """Rebuild the embedded model, hours on two cores."""
    quiet_allocator()
    size = QUICK if quick else Size()
    size = size._replace(
        base_steps=size.base_steps if base_steps is None else base_steps,
        base_decay=size.base_decay if base_decay is None else base_decay,
    )
    if quick:
        torch.compiler.set_stance("force_eager")
    if only_base:  # one of the processes started by `train_base_on`
        torch.distributed.init_process_group("gloo")
        torch.set_num_threads(1)
        train_base.train(
            train_base.read_pool(cache / "base"), cache / "base", steps=size.base_steps, decay=size.base_decay,
            minutes=minutes, batch=size.base_batch,
        )
        return
    out = out or cache / "generator"

    print("stage 1 of 6: packages and sprites", flush=True)
    data.fetch(cache / "packages")
    concepts, sprites = data.sprites(cache / "packages", data.TRAIN_VENDORS, cache / "train.npz")
    _, other = data.sprites(cache / "packages", data.JUDGE_VENDORS, cache / "judge.npz")
    if not len(concepts) == len(sprites) == len(other):
        raise ValueError(f"the sprites in {cache} are of another list of concepts: delete them and run again")
    concepts, sprites, other = concepts[: size.concepts], sprites[: size.concepts], other[: size.concepts]
    names, tags = [concept["name"] for concept in concepts], [concept["tags"] for concept in concepts]

    print("stage 2 of 6: judge and prompts", flush=True)
    if not (out / "prompts/train.txt").exists():
        build_judge.build(concepts, sprites, other, out, evaluated=size.evaluated, training=size.prompts)

    print("stage 3 of 6: tokens", flush=True)
    if from_stage:
        train_base.load_stage(from_stage, cache / "base", cache / "vq")
    images = drawn_images(sprites, cache / "images.npy", count=size.tokenizer_images)
    if train_vq.updates(cache / "vq", "tokens") < size.token_steps:  # new tokens: another pool, and a decoder for them
        for stale in ("vq/decoder.json", "vq/decoder.pt", "base/pool.safetensors"):
            (cache / stale).unlink(missing_ok=True)
    train_vq.train_tokens(images, cache / "vq", steps=size.token_steps, batch=size.tokenizer_batch, device=device)

    print("stage 4 of 6: base", flush=True)
    if not (cache / "base/pool.safetensors").exists():
        train_base.make_pool(sprites, names, tags, cache / "vq", cache / "base", device=device)
    done = train_base_on(cache, size, minutes=minutes, device=device, processes=processes, quick=quick)

    print("stage 5 of 6: decoder", flush=True)
    half = size.tokenizer_batch // 2  # it works at 64x64
    train_vq.train_decoder(images, cache / "vq", steps=size.decoder_steps, batch=half, device=device)
    train_base.export(cache / "base", cache / "vq", out)
    if save_stage:
        train_base.save_stage(cache / "base", cache / "vq", save_stage)
    if done < size.base_steps:
        print(f"the base has had {done} of {size.base_steps} updates: run again to go on", flush=True)
        return

    print("stage 6 of 6: reward", flush=True)
    train_clip.train(
        sprites, names, tags, cache / "vq", cache / "reward", steps=size.reward_steps, images=size.reward_images
    )
    shutil.copytree(cache / "reward", out / "reward", dirs_exist_ok=True)


if __name__ == "__main__":
    typer.run(in_one_line(main))
