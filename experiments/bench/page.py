"""The benchmark's part of docs/performance.md, from the files of `python -m experiments.bench`."""

import inspect
import json
from pathlib import Path

from experiments.bench import parts
from experiments.bench.growth import growth
from experiments.bench.measure import table
from experiments.bench.pipeline import against_pipeline

RESULTS = Path(__file__).parents[1] / "results" / "bench"
PARTS = {
    "mfu": parts.utilisation,
    "pipeline": against_pipeline,
    "plain": parts.against_plain,
    "train-steps": parts.trained_steps,
    "sample": parts.command,
    "growth": growth,
}
TITLES = {"mfu": "Share of the machine's best", "pipeline": "Against diffusers", "plain": "Against a plain iteration",
          "train-steps": "Training on some of the steps", "sample": "The command, and where its time goes",
          "growth": "Growth"}


def report(folder: Path) -> str:
    """All results in a folder as Markdown: for each part what it is, its table, and where and when it was measured."""
    lines = []
    for name, measure in PARTS.items():
        if (path := folder / f"{name}.json").exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            where, best = found["machine"], found["ceilings"]
            on = f"{where['device']}, {where['threads']} threads, {where['torch']}, {where['date']}."
            of = ", ".join(f"{value:.3g} {unit}" for unit, value in best.items())
            lines += [f"### {TITLES[name]}", inspect.getdoc(measure), table(found["rows"]), f"{on}\nIts best: {of}."]
    return "\n\n".join(line.strip() for line in lines if line) + "\n"
