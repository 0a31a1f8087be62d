"""Figures of studies: curves over iterations."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from speedrl.evaluation.measuring import legend
from speedrl.studies.intervals import interval, paired
from speedrl.system.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*<>hd8"
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))


def look(k: int) -> dict[str, Any]:
    """Colour, marker and dash of line k: of 65 lines no two share marker and dash, of 13 no two a marker, so no colour
    is needed."""
    return {
        "color": f"C{k % 11 - 1}" if k % 11 else "black",
        "marker": MARKERS[k % len(MARKERS)],
        "linestyle": DASHES[k % len(DASHES)],
    }


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes PATH.png and PATH.svg; the same figure gives the same files."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "speedrl"}):
        write_atomically(path.with_name(f"{path.name}.png"), lambda to: figure.savefig(to, format="png"))
        write_atomically(
            path.with_name(f"{path.name}.svg"), lambda to: figure.savefig(to, format="svg", metadata={"Date": None})
        )


def by_iteration(run: Sequence[dict], metric: str) -> dict[int, float]:
    """A metric of a run's metrics.jsonl by iteration, without those that have no value."""
    return {row["iteration"]: row[metric] for row in run if row.get(metric) is not None}


def over_iterations(runs: Sequence[Sequence[dict]], metric: str) -> tuple[list[int], list[float], list[float | None]]:
    """Iterations, means and half-widths of 95 % intervals over runs of a metric of their metrics.jsonl.

    Up to the last iteration that every run has reached; no interval from one run. Iterations without a value, as of a
    metric that some run did not log, are left out.
    """
    values = [by_iteration(run, metric) for run in runs]
    common = sorted(set.intersection(*map(set, values))) if values else []
    found = [interval([run[iteration] for run in values]) for iteration in common]
    return common, [mean for mean, _ in found], [width for _, width in found]


def over_stretches(
    runs: Mapping[int, Sequence[dict]], others: Mapping[int, Sequence[dict]], metric: str, *, stretches: int = 5
) -> list[tuple[float, float, float | None]]:
    """How much a metric of `runs` differs from that of `others`, in stretches of iterations of about equal length.

    Both are rows of metrics.jsonl by seed, and the difference is paired by it: the same prompts and noise. -> for each
    stretch its middle, the mean difference and half its 95 % interval (`paired`). [] without a common seed.
    """
    pairs = {}
    for seed in runs.keys() & others.keys():
        one, other = by_iteration(runs[seed], metric), by_iteration(others[seed], metric)
        pairs[seed] = {i: (one[i], other[i]) for i in one.keys() & other.keys()}
    common = sorted(set.intersection(*map(set, pairs.values()))) if pairs else []
    bounds = [round(len(common) * k / stretches) for k in range(stretches + 1)]
    found = []
    for part in filter(None, (common[low:high] for low, high in itertools.pairwise(bounds))):
        mine, theirs = ({seed: fmean(pairs[seed][i][side] for i in part) for seed in pairs} for side in (0, 1))
        difference = paired(mine, theirs)
        found.append(((part[0] + part[-1]) / 2, difference["difference"], difference["interval"]))
    return found


def plot_curves(
    variants: Mapping[str, Mapping[int, Sequence[dict]]],
    path: Path,
    *,
    metrics: Mapping[str, str],
    title: str = "",
) -> None:
    """Metrics over iterations into PATH.png and PATH.svg: a row for each, a line for each variant.

    `variants` are runs by name and seed, each the rows of a metrics.jsonl; `metrics` are titles by name. Left the means
    over seeds, and around the first variant's the 95 % interval (Student's t), that of the others being much the same;
    right what the others differ from the first by, seed for seed, with its interval: seeds differ by more than variants
    do, so that on the left their bands would hide everything.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no window
    from matplotlib.ticker import MaxNLocator

    baseline = next(iter(variants))
    figure = Figure(figsize=(12, 3.2 * len(metrics) + 0.15 * len(variants)), layout="constrained", dpi=110)
    panels = figure.subplots(len(metrics), 2, squeeze=False)
    for (left, right), (metric, label) in zip(panels, metrics.items(), strict=True):
        for k, (name, runs) in enumerate(variants.items()):
            style = look(k)
            iterations, means, widths = over_iterations(list(runs.values()), metric)
            every = max(1, len(iterations) // 8)
            left.plot(iterations, means, label=name, markevery=every, markersize=5, **style)
            known = [width for width in widths if width is not None]  # all, or none of one run
            if name == baseline and known:
                low, high = ([m + sign * w for m, w in zip(means, known, strict=True)] for sign in (-1, 1))
                left.fill_between(iterations, low, high, color=style["color"], alpha=0.15, linewidth=0)
            found = over_stretches(runs, variants[baseline], metric) if name != baseline else []
            if found:
                middles, differences, bars = zip(*found, strict=True)
                apart = (middles[-1] - middles[0]) / max(1, len(middles) - 1) or 1  # side by side, not on one another
                places = [middle + apart * 0.6 * (k / len(variants) - 0.5) for middle in middles]
                right.errorbar(places, differences, yerr=None if None in bars else bars, markersize=5, capsize=2,
                               linewidth=1, **style)
        right.axhline(0, color="0.6", linewidth=1, zorder=0)
        left.set_title(label, fontsize=10)
        right.set_title(f"the same, less that of {baseline}, by seed", fontsize=10)
        for panel in (left, right):
            panel.set_xlabel("iteration")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.grid(alpha=0.3)
    figure.suptitle(title)
    legend(figure, panels, columns=3)
    save_figure(figure, path)
