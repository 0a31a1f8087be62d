"""How seconds and memory of an iteration grow with its batch, steps, tokens and codes."""

from pathlib import Path

from experiments.bench.measure import exponent, in_a_process
from experiments.bench.parts import TINY, options

BASE = {"width": 512, "head": 64, "double": 1, "single": 2, "batch": 8, "micro-batch": 8, "steps": 4, "grid": 16,
        "codes": 1024, "text": 77}
SWEEPS = {
    "batch": (2, 4, 8, 16, 32),
    "steps": (2, 4, 8, 16, 32),
    "grid": (8, 16, 32, 64),
    "codes": (1024, 4096, 16384, 65536),
}

MEASURED = {"sampling": "sampling s", "training": "training s", "memory": "GB above the weights"}


def growth(ceilings: dict[str, float], *, device: str, small: bool, out: Path) -> list[dict]:
    """How an iteration of a random model grows with one number, where the others stay at 8 images, 4 steps, 256 tokens
    and 1024 codes. Shown are the exponents of a power law, fitted over the larger half of the range; 1 is linear.
    Memory is what the iteration adds to that of the weights."""
    rows = []
    for name, values in SWEEPS.items():
        points = []
        for value in values[:2] if small else values:
            setting = BASE | (TINY if small else {}) | {name: value, "device": device}
            setting |= {"micro-batch": value} if name == "batch" else {}
            found = in_a_process("experiments.bench.iteration", "ours", *options(setting))
            points.append((value**2 if name == "grid" else value, found))
        larger = points[(len(points) - 1) // 2 :]
        fitted = {what: exponent([x for x, _ in larger], [max(found[key], 1e-3) for _, found in larger])
                  for what, key in MEASURED.items()}
        what = "tokens" if name == "grid" else name
        rows.append({"what grows": what, "from": points[0][0], "to": points[-1][0]} | fitted)
    return rows
