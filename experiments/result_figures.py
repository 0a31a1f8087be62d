"""The figures of the pages of results."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.result_pages import FIGURE, FRONTIER, MAIN, SPEED
from speedrl.evaluation.measuring import label_evaluations, legend
from speedrl.evaluation.reports import AFTER, BEFORE, SEARCHED
from speedrl.studies.ablations import TITLES
from speedrl.studies.plots import look
from speedrl.system.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN = ("judge_margin", "reward")


def draw_figures(found: Mapping[str, dict], folder: Path) -> None:
    """The figures of these pages."""
    if MAIN in found:
        save_svg(quality_figure(found[MAIN]), folder / FIGURE)
    if SPEED in found:
        save_svg(front_figure(found[SPEED]), folder / FRONTIER)


def save_svg(figure: "Figure", path: Path) -> None:
    """The same figure gives the same file."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "speedrl"}):
        write_atomically(path, lambda to: figure.savefig(to, format="svg", metadata={"Date": None}))


def panels_of(rows: list[dict]) -> tuple["Figure", Any, dict[tuple[str, str], Any]]:
    """A figure, its axes, and a panel for each set of prompts and each metric of DRAWN."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no window

    sets = list(dict.fromkeys(row["prompts"] for row in rows))
    figure = Figure(figsize=(9, 3 * len(sets) + 0.6), layout="constrained")
    axes = figure.subplots(len(sets), len(DRAWN), squeeze=False)
    panels = dict(zip(itertools.product(sets, DRAWN), axes.flat, strict=True))
    for (which, metric), panel in panels.items():
        panel.set_title(f"{TITLES[metric]}, {which} prompts", fontsize=10)
        panel.grid(alpha=0.3)
    return figure, axes, panels


def points(rows: Iterable[dict], across: str, metric: str) -> list[tuple[float, float, float]]:
    """Sorted places, means and half-widths of intervals, 0 without one, of the rows that have both."""
    return sorted((row[across], row[metric], row.get(f"{metric}_interval") or 0.0) for row in rows
                  if row.get(across) is not None and row.get(metric) is not None)


def quality_figure(found: dict) -> "Figure":
    """Quality against network evaluations of base and trained model, with bands of the interval.

    The trained model's own number of steps ("auto") is a star.
    """
    figure, axes, panels = panels_of(found["rows"])
    shown = [row for row in found["rows"] if row["model"] in (BEFORE, SEARCHED, found["baseline"])]
    curves = list(dict.fromkeys((row["model"], row["guidance"]) for row in shown))
    for ((which, metric), panel), (k, curve) in itertools.product(panels.items(), enumerate(curves)):
        own = [row for row in shown if (row["model"], row["guidance"]) == curve and row["prompts"] == which]
        name, style = AFTER if curve[0] == found["baseline"] else f"{curve[0]}, guidance {curve[1]:g}", look(k)
        if fixed := points((row for row in own if row["steps"] != "auto"), "network_evaluations", metric):
            places, means, widths = zip(*fixed, strict=True)
            panel.plot(places, means, label=name, markersize=5, **style)
            low, high = ([m + sign * w for m, w in zip(means, widths, strict=True)] for sign in (-1, 1))
            panel.fill_between(places, low, high, color=style["color"], alpha=0.2, linewidth=0)
        for place, mean, width in points((row for row in own if row["steps"] == "auto"), "network_evaluations", metric):
            panel.errorbar(place, mean, yerr=width, label=f"{name}, auto steps", capsize=2, markersize=12,
                           **style | {"marker": "*", "linestyle": ""})
    for panel in panels.values():
        label_evaluations(panel, shown)
    legend(figure, axes, columns=2)
    return figure


def front_figure(found: dict) -> "Figure":
    """Quality against network evaluations: each variant with the steps that its step policy takes, and the searched
    base's curve."""
    own = [row for row in found["rows"] if row["steps"] == "auto"]
    guidance = {row["guidance"] for row in own}
    base = [row for row in found["rows"] if row["model"] == SEARCHED and row["guidance"] in guidance]
    figure, axes, panels = panels_of(own)
    for k, model in enumerate([SEARCHED, *dict.fromkeys(row["model"] for row in own)]):
        style = look(k) | ({} if model == SEARCHED else {"linestyle": ""})
        for (which, metric), panel in panels.items():
            rows = (row for row in [*base, *own] if (row["model"], row["prompts"]) == (model, which))
            if found_at := points(rows, "network_evaluations", metric):
                places, means, widths = zip(*found_at, strict=True)
                panel.errorbar(places, means, yerr=widths, label=model, capsize=2, markersize=6, **style)
    for panel in panels.values():
        label_evaluations(panel, base + own)
    legend(figure, axes, columns=3)
    return figure
