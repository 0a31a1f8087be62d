"""Parts of the benchmark that measure whole iterations and the command, each in processes of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path

from experiments.bench.measure import ROOT, in_a_process

TINY = {"width": 64, "head": 32, "codes": 64, "grid": 8, "text": 8, "repeats": 1}


def options(setting: dict) -> list[object]:
    return [part for name, value in setting.items() for part in (f"--{name}", value)]


def utilisation(ceilings: dict[str, float], *, device: str, small: bool, out: Path) -> list[dict]:
    """MFU is the operations that the mathematics needs, by `experiments/bench/flops.py`, over the seconds they took, as
    a share of a large matrix product in the same precision. What is computed twice to save memory does not count."""
    gpu = device != "cpu"
    settings = {"embedded model": {"model": "embedded", "batch": 64, "micro-batch": 32, "steps": 8}}
    if small:
        settings["embedded model"] |= {"batch": 2, "micro-batch": 2, "steps": 2, "repeats": 1}
    elif gpu:
        full = {"double": 14, "single": 28, "batch": 4, "micro-batch": 1, "steps": 8, "train-steps": 4}
        settings["Meissonic, 14 + 28 blocks, 1024 px"] = full
    else:
        settings["Meissonic, 1 + 2 blocks, 1024 px"] = {"double": 1, "single": 2, "batch": 2, "steps": 4}
    rows = []
    for name, setting in settings.items():
        found = in_a_process("experiments.bench.iteration", "ours", *options(setting), "--device", device)
        for what in ("sampling", "training"):
            speed = found[f"{what} FLOP"] / found[f"{what} s"] / 1e12
            rows.append({"model": name, "what": what, "precision": found["precision"], "seconds": found[f"{what} s"],
                         "TFLOP/s": speed, "MFU": speed / ceilings[f"{found['precision']} TFLOP/s"]})
    return rows


def against_plain(ceilings: dict[str, float], *, device: str, small: bool, out: Path) -> list[dict]:
    """An iteration without decoder and reward, at 4096 tokens and 8192 codes, 4 images, 4 steps. The plain one is
    eager, and keeps logits and log-softmax of all positions and steps for autograd. One has our setting of the memory
    allocator, and one has a backward pass after each step. The exact likelihood scores all tokens that were drawn."""
    setting = {"double": 1, "single": 2, "batch": 4, "steps": 4, "device": device} | (TINY if small else {})
    kinds = {"plain": ("plain",), "plain, our allocator": ("plain", "--quiet"),
             "plain, backward each step": ("plain-each-step",), "ours": ("ours", "--micro-batch", 2),
             "ours, micro-batch 1": ("ours", "--micro-batch", 1),
             "ours, exact likelihood": ("ours", "--micro-batch", 2, "--likelihood", "exact")}
    rows = []
    for name, kind in kinds.items():
        found = in_a_process("experiments.bench.iteration", *kind, *options(setting))
        rows.append({"iteration": name, "sampling s": found["sampling s"], "training s": found["training s"],
                     "seconds": found["sampling s"] + found["training s"], "peak GB": found["peak GB"]})
    return [row | {"times as fast": rows[0]["seconds"] / row["seconds"],
                   "share of memory": row["peak GB"] / rows[0]["peak GB"]} for row in rows]


def trained_steps(ceilings: dict[str, float], *, device: str, small: bool, out: Path) -> list[dict]:
    """Seconds of an update of the embedded model, 64 images of 8 steps. K of the steps enter the loss
    (`--train-steps`)."""
    setting = {"model": "embedded", "batch": 2 if small else 64, "micro-batch": 16, "steps": 8, "device": device}
    setting |= {"repeats": 1} if small else {}
    rows = []
    for count in (8, 2) if small else (8, 4, 2, 1):
        found = in_a_process("experiments.bench.iteration", "ours", *options(setting | {"train-steps": count}))
        rows.append({"K": count, "training s": found["training s"], "peak GB": found["peak GB"]})
    return [row | {"times as fast": rows[0]["training s"] / row["training s"]} for row in rows]


def command(ceilings: dict[str, float], *, device: str, small: bool, out: Path) -> list[dict]:
    """Seconds of the command as a user feels them, medians of 3. Then the seconds of an image once all is loaded, and
    the shares of its parts. Trained models are sampled without guidance."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}

    def felt(*arguments: object) -> float:
        times = []
        for _ in range(1 if small else 3):
            began = time.perf_counter()
            command = [sys.executable, "-m", "speedrl", *map(str, arguments)]
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - began)
        return sorted(times)[len(times) // 2]

    image = out / "owl.png"
    rows = [{"what": "speedrl --help", "seconds": felt("--help")}]
    for steps in (32, 8, 4):
        how = ("sample", "an owl", "--steps", steps, "--device", device, "--out", image)
        rows.append({"what": f"speedrl sample, {steps} steps", "seconds": felt(*how)})
    image.unlink()
    base, trained = "with guidance", "without"
    for how, guidance, steps in (
        (base, None, 32),
        (base, None, 8),
        (base, None, 4),
        (trained, 1.0, 8),
        (trained, 1.0, 4),
    ):
        for count in (1,) if small else (1, 64):
            given = {"steps": steps, "count": count, "device": device} | ({"guidance": guidance} if guidance else {})
            found = in_a_process("experiments.bench.shares", *options(given))
            rows.append({"what": f"{steps} steps {how}, {count} at a time, an image"} | found)
    return rows
