"""How seconds and memory of an iteration grow with what it is of: a table, the exponents and a plot."""

from pathlib import Path

from experiments.bench.measure import exponent, in_a_process
from experiments.bench.parts import TINY, options
from speedrl.system.files import write_atomically

BASE = {"width": 512, "head": 64, "double": 1, "single": 2, "batch": 8, "micro-batch": 8, "steps": 4, "grid": 16,
        "codes": 1024, "text": 77}  # fmt: skip
SWEEPS = {
    "batch": (2, 4, 8, 16, 32),
    "steps": (2, 4, 8, 16, 32),
    "grid": (8, 16, 32, 64),
    "codes": (1024, 4096, 16384, 65536),
}

KEYS = ("sampling s", "training s", "GB above the weights")


def growth(ceilings: dict[str, float], *, device: str, small: bool, out: Path) -> list[dict]:
    """Seconds and peak memory of an iteration of a random model (1 double and 2 single blocks, width 512) while one
    number grows and the others stay at 8 images of 4 steps in one micro-batch, 256 tokens, 1024 codes. The exponent k
    of ~x^k is fitted over the larger half of each range; memory is what the iteration adds to that of the weights."""
    rows = []
    for name, values in SWEEPS.items():
        points = []
        for value in values[:2] if small else values:
            setting = BASE | (TINY if small else {}) | {name: value, "device": device}
            setting |= {"micro-batch": value} if name == "batch" else {}
            found = in_a_process("experiments.bench.iteration", "ours", *options(setting))
            points.append({"what": "tokens" if name == "grid" else name, "of": value**2 if name == "grid" else value}
                          | {key: found[key] for key in KEYS})  # fmt: skip
        half = points[(len(points) - 1) // 2 :]
        fitted = {f"{key} ~x^": exponent([p["of"] for p in half], [max(p[key], 1e-3) for p in half]) for key in KEYS}
        rows += [*points[:-1], points[-1] | fitted]
    plot(rows, out / "growth.png")
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Seconds and memory against each of what grows, on logarithmic axes."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["what"] for row in rows))
    figure = Figure(figsize=(3.2 * len(names), 6), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        points = [row for row in rows if row["what"] == name]
        for line, keys in enumerate((KEYS[:2], KEYS[2:])):
            axis = axes[line][column]
            for key in keys:
                axis.plot([p["of"] for p in points], [p[key] for p in points], marker="o", label=key)
            axis.set(xscale="log", yscale="log", xlabel=name)
            axis.grid(alpha=0.3)
            if column == 0:
                axis.legend(frameon=False)
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
