"""Independent samples compared, and figures of quality against cost."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from speedrl.evaluation.measuring import METRICS, label_evaluations, legend
from speedrl.studies.plots import look, save_figure


def welch(
    mean: float, spread: float | None, count: int, *, other: tuple[float, float | None, int], level: float = 0.95
) -> dict:
    """As `paired`, of two independent samples: mean, standard deviation (n - 1) and size of each.

    Welch's interval, with the Welch-Satterthwaite degrees of freedom: the spreads may differ.
    """
    difference, seeds = mean - other[0], min(count, other[2])
    if spread is None or other[1] is None or seeds < 2:
        return {"difference": difference, "interval": None, "seeds": seeds, "outside": None}
    a, b = spread**2 / count, other[1] ** 2 / other[2]
    width = 0.0
    if a + b > 0:
        from scipy.stats import t

        freedom = (a + b) ** 2 / (a**2 / (count - 1) + b**2 / (other[2] - 1))
        width = float(t.ppf((1 + level) / 2, freedom)) * (a + b) ** 0.5
    return {"difference": difference, "interval": width, "seeds": seeds, "outside": abs(difference) > width}


def plot_pareto(
    methods: Mapping[str, Sequence[dict]],
    path: Path,
    *,
    quality: str = "judge_r1",
    titles: Mapping[str, str] | None = None,
    real: Mapping[str, float] | None = None,
) -> None:
    """Quality and diversity against network evaluations and seconds an image, into PATH.png and PATH.svg.

    `methods` are rows as of `evaluate` by the method's name: a line each, bars the rows' METRIC_interval. Above the
    quality, below the diversity; left against network evaluations, right against seconds. `real` is what real images
    have.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    titles = {quality: METRICS.get(quality, quality), "diversity": "diversity"} | dict(titles or {})
    costs = {"network_evaluations": "network evaluations an image", "seconds_per_image": "seconds an image"}
    figure = Figure(figsize=(10, 7 + 0.2 * len(methods)), layout="constrained", dpi=130)
    panels = figure.subplots(2, 2, squeeze=False)
    for (i, metric), (j, cost) in itertools.product(enumerate((quality, "diversity")), enumerate(costs)):
        panel = panels[i][j]
        for k, (name, rows) in enumerate(methods.items()):
            points = sorted(
                (row[cost], row[metric], row.get(f"{metric}_interval") or 0.0)
                for row in rows
                if row.get(metric) is not None
            )
            if points:
                places, values, widths = zip(*points, strict=True)
                panel.errorbar(places, values, yerr=widths, label=name, markersize=6, capsize=2, **look(k))
        if real and real.get(metric) is not None:
            panel.axhline(real[metric], color="0.75", linewidth=4, zorder=0, label="real images")
        if j == 0:
            label_evaluations(panel, [row for rows in methods.values() for row in rows])
        else:  # as plain numbers, few enough to be read
            panel.set_xscale("log", base=10)
            panel.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set_xlabel(costs[cost])
        panel.set_ylabel(titles[metric])
        panel.grid(alpha=0.3)
    legend(figure, panels, columns=3)
    save_figure(figure, path)
