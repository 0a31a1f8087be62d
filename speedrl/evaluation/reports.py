"""What a run or a study ends with: a trained model beside its base, curves over iterations, and Pareto figures."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track

from speedrl.evaluation.measuring import METRICS, calls_of, judge_if_there, network_calls, one_cell, prompt_sets, table
from speedrl.generation import contact_sheet, draw, sample, save_png
from speedrl.method.remasking import split_steps
from speedrl.models.checkpoint import load_generator
from speedrl.rewards.loading import load_qualities
from speedrl.studies.intervals import interval, paired
from speedrl.system.files import write_atomically, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*<>hd8"
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))


def report(
    base: str,
    trained: str | Path,
    *,
    out: str | Path,
    prompts: str | Path | None = None,
    quality: str = "embedded",
    reward_weights: Sequence[str] = (),
    some: int = 16,
    count: int = 4,
    seeds: int = 3,
    pictures: int = 10,
    compile: bool = False,
    device: str = "cpu",
    loading: Mapping[str, Any] | None = None,
) -> list[dict]:
    """Compares a trained model with its base on the same prompts and noise; returns rows as `evaluate` does.

    The rows: the base at its own steps and guidance; the base at the trained model's steps, at its own guidance and
    without, each as it is and with the tuning that was learned beside the trained weights, or where none was at twice
    its temperature (what few steps give without other weights); the trained model as it was trained, and where it
    chooses its steps also at their rounded mean, which then counts as its steps; and both without guidance, or as the
    trained model has it, at twice and four times its steps and so on, up to a quarter of the network calls of the first
    row, the base as it is and with the trained model's revision where there is one. On the first `some` prompts of each
    set, `count` pictures of each for each of `seeds` seeds. `compile` pays where there are many pictures.
    Writes OUT/comparison.json and OUT/before_after.png and prints the table.
    """
    out, trained, console = Path(out), str(trained), Console()
    before, after = load_generator(base, device=device, **(loading or {})), load_generator(trained, device=device)
    if compile:
        torch.compiler.reset()  # after the networks of a training the compiler would give up
        before.transformer.compile_blocks()
        after.transformer.compile_blocks()
    sets = {which: lines[:some] for which, lines in prompt_sets(prompts, None).items()}
    judge = judge_if_there(device, console)
    scores, _ = load_qualities(quality, device=device, weights=reward_weights)
    few, heat, own = after.steps, before.temperature, [after.steps]
    if after.pace is not None:
        shown = [prompt for lines in sets.values() for prompt in lines]
        few = max(1, round(draw(after, shown, steps="auto")[1].double().mean().item()))
        own = ["auto", few]
    settings = [(base, before, before.steps, before.guidance, heat)]
    strengths = dict.fromkeys((before.guidance, 1.0))
    if after.tuning is None:
        settings += [(base, before, few, g, t) for g in strengths for t in (heat, 2 * heat)]
    else:
        settings += [(base, before, few, g, heat) for g in strengths]
        settings += [(f"{base}, tuned", before._replace(tuning=after.tuning), few, g, heat) for g in strengths]
    quarter = max(1, network_calls(before.steps, before.guidance) // (4 * network_calls(1, after.guidance)))
    more = [few * 2**k for k in range(1, quarter.bit_length()) if few * 2**k < quarter] + [quarter]
    settings += [(base, before, n, after.guidance, heat) for n in more if n != few]
    again = before._replace(revise=after.revise)
    enough = [n for n in dict.fromkeys((few, *more)) if split_steps(n, share=after.revise)[1]]
    settings += [(f"{base}, revised", again, n, after.guidance, heat) for n in enough]
    settings += [(trained, after, n, after.guidance, after.temperature) for n in dict.fromkeys((*own, *more))]
    rows = []
    for which in sets:
        for model, generator, steps, guidance, temperature in track(settings, f"comparing, {which} prompts"):
            row = {"model": model, "prompts": which, "steps": steps, "guidance": guidance, "temperature": temperature}
            row["network_calls"] = None if steps == "auto" else network_calls(steps, guidance)  # None until counted
            row |= one_cell(
                generator, judge, scores, sets[which], which=which, steps=steps, guidance=guidance,
                temperature=temperature, count=count, seeds=seeds, batch=None, after_seed=lambda: None,
            )  # fmt: skip
            rows.append(row)
            write_json(out / "comparison.json", rows)

    shown = next(iter(sets.values()))[:pictures]
    lines = [("before", before, before.steps), ("before", before, few)]
    lines += [("after", after, n) for n in dict.fromkeys((own[0], quarter))]
    labels = [
        f"{when}: {n} steps, {network_calls(few if n == 'auto' else n, g.guidance)} calls" for when, g, n in lines
    ]
    sheet = [sample(generator, shown, steps=steps).cpu() for _, generator, steps in lines]
    scale = max(1, 96 // sheet[0].shape[-1])
    save_png(contact_sheet(sheet, labels=labels, titles=shown, scale=scale), out / "before_after.png")
    names = {base: "before", f"{base}, tuned": "before, tuned", f"{base}, revised": "before, revised", trained: "after"}
    named = [row | {"model": names[row["model"]]} for row in rows]
    console.print(table(named, width=console.width))
    console.print(f"wrote {out / 'before_after.png'} and {out / 'comparison.json'}", soft_wrap=True)
    return rows


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


def over_iterations(runs: Sequence[Sequence[dict]], metric: str) -> tuple[list[int], list[float], list[float | None]]:
    """Iterations, means and half-widths of 95 % intervals over runs of a metric of their metrics.jsonl.

    Up to the last iteration that every run has reached; no interval from one run. Iterations without a value, as of a
    metric that some run did not log, are left out.
    """
    by_iteration = [{row["iteration"]: row[metric] for row in run if row.get(metric) is not None} for run in runs]
    common = sorted(set.intersection(*map(set, by_iteration))) if by_iteration else []
    found = [interval([run[iteration] for run in by_iteration]) for iteration in common]
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
        one, other = ({row["iteration"]: row.get(metric) for row in of[seed]} for of in (runs, others))
        pairs[seed] = {i: (one[i], other[i]) for i in one if None not in (one[i], other.get(i))}
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
            if name == baseline and None not in widths:
                low, high = ([m + sign * w for m, w in zip(means, widths, strict=True)] for sign in (-1, 1))
                left.fill_between(iterations, low, high, color=style["color"], alpha=0.15, linewidth=0)
            found = over_stretches(runs, variants[baseline], metric) if name != baseline else []
            if found:
                middles, differences, bars = zip(*found, strict=True)
                apart = (middles[-1] - middles[0]) / max(1, len(middles) - 1) or 1  # side by side, not on one another
                places = [middle + apart * 0.6 * (k / len(variants) - 0.5) for middle in middles]
                bars = None if None in bars else bars
                right.errorbar(places, differences, yerr=bars, markersize=5, capsize=2, linewidth=1, **style)
        right.axhline(0, color="0.6", linewidth=1, zorder=0)
        left.set_title(label, fontsize=10)
        right.set_title(f"the same, less that of {baseline}, by seed", fontsize=10)
        for panel in (left, right):
            panel.set_xlabel("iteration")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.grid(alpha=0.3)
    figure.suptitle(title)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    save_figure(figure, path)


def plot_pareto(
    methods: Mapping[str, Sequence[dict]],
    path: Path,
    *,
    quality: str = "judge_r1",
    titles: Mapping[str, str] | None = None,
    real: Mapping[str, float] | None = None,
) -> None:
    """Quality and diversity against network calls and seconds a picture, into PATH.png and PATH.svg.

    `methods` are rows as of `evaluate` by the method's name: a line each, bars the rows' METRIC_interval. Above the
    quality, below the diversity; left against network calls, right against seconds. `real` is what real pictures have.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    titles = {quality: METRICS.get(quality, quality), "diversity": "diversity"} | dict(titles or {})
    figure = Figure(figsize=(10, 7 + 0.2 * len(methods)), layout="constrained", dpi=130)
    panels = figure.subplots(2, 2, squeeze=False)
    every = sorted((row for rows in methods.values() for row in rows), key=lambda row: row["network_calls"])
    ticks = {row["network_calls"]: calls_of(row) for row in every}
    for (i, metric), (j, cost) in (
        (a, b) for a in enumerate((quality, "diversity")) for b in enumerate(("network_calls", "seconds_per_image"))
    ):
        panel = panels[i][j]
        for k, (name, rows) in enumerate(methods.items()):
            points = sorted(
                (row[cost], row[metric], row.get(f"{metric}_interval") or 0.0)
                for row in rows
                if row.get(metric) is not None
            )
            if points:
                costs, values, widths = zip(*points, strict=True)
                panel.errorbar(costs, values, yerr=widths, label=name, markersize=6, capsize=2, **look(k))
        if real and real.get(metric) is not None:
            panel.axhline(real[metric], color="0.75", linewidth=4, zorder=0, label="real pictures")
        panel.set_xscale("log", base=2 if cost == "network_calls" else 10)
        if cost == "network_calls":
            panel.set_xticks(list(ticks), list(ticks.values()))
        else:  # as plain numbers, few enough to be read
            panel.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_ylabel(titles[metric])
        panel.set_xlabel({"network_calls": "network calls a picture", "seconds_per_image": "seconds a picture"}[cost])
        panel.grid(alpha=0.3)
    pairs = [pair for panel in panels.flat for pair in zip(*panel.get_legend_handles_labels(), strict=True)]
    known = {label: handle for handle, label in pairs}
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    save_figure(figure, path)
