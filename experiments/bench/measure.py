"""How times, memory and growth are measured, the same for every part of the benchmark."""

import datetime
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], *, device: str, repeats: int = 5, warmup: int = 1) -> float:
    """Median seconds of `repeats` runs, after `warmup` runs that compile and fill caches."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        synchronise(device)
        began = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def peak_gb(device: str) -> float:
    """The most memory that this process had, GB: of the GPU where there is one, of the process otherwise."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The k of y ~ x^k, by least squares of the logarithms."""
    x, y = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    along = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return along / sum((a - mean_x) ** 2 for a in x)


def in_a_process(module: str, *options: object) -> dict:
    """Runs `python -m module options` and reads the JSON of its last line: memory and caches of its own."""
    command = [sys.executable, "-m", module, *map(str, options)]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def machine(device: str) -> dict:
    """What was measured on."""
    name = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    today = datetime.date.today().isoformat()
    return {"device": name, "threads": torch.get_num_threads(), "torch": f"torch {torch.__version__}", "date": today}


def table(rows: Sequence[dict]) -> str:
    """Rows as a Markdown table; three significant digits, nothing where a row has no such column."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: object) -> str:
        return f"{value:#.3g}".rstrip(".") if isinstance(value, float) else "" if value is None else str(value)

    words = {name for name in names if any(isinstance(row.get(name), str) for row in rows)}
    ruler = ["---" if name in words else "--:" for name in names]
    lines = [names, ruler, *([cell(row.get(name)) for name in names] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
