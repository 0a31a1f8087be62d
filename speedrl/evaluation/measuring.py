"""Evaluation: how good, how true to the prompt, how diverse and how fast, over a list of step counts."""

import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from speedrl.evaluation.judging import (
    Judge,
    concepts_in,
    diversity,
    features,
    frechet,
    load_judge,
    pixel_diversity,
    recall,
)
from speedrl.generation import contact_sheet, draw, sample, save_png
from speedrl.method.remasking import check_share
from speedrl.method.sampling import ORDERS
from speedrl.method.schedules import mask_ratio
from speedrl.models.checkpoint import Generator, chooses_steps, decode, fitting_batch, load_generator, parts_of
from speedrl.rewards.loading import EMBEDDED, Score, load_qualities
from speedrl.run.prompts import read_prompts
from speedrl.system.files import write_atomically, write_json
from speedrl.system.platform import check_device

METRICS = {
    "reward": "reward", "judge_r1": "R@1", "judge_r5": "R@5", "frechet": "Fréchet", "diversity": "diversity",
    "pixel_diversity": "pixel diversity",
}  # fmt: skip
USUAL = {"schedule": "cosine", "order": "confidence", "revise": 0.0}  # settings of the sampler, and what is not told


def evaluate(
    models: Sequence[str],
    *,
    out: str | Path = "runs/eval",
    steps: Sequence[int | str] = (1, 2, 4, 8, 16, 32),
    guidance: Sequence[float] | None = None,
    temperature: Sequence[float] | None = None,
    schedule: Sequence[str] | None = None,
    order: Sequence[str] | None = None,
    revise: Sequence[float] | None = None,
    prompts: str | Path | Sequence[str] | None = None,
    held_out: str | Path | Sequence[str] | None = None,
    count: int = 4,
    seeds: int = 3,
    quality: str | None = "embedded",
    reward_weights: Sequence[str] = (),
    pictures: int = 10,
    figure: bool = True,
    batch: int | None = None,
    compile: bool = False,
    device: str = "cpu",
    loading: Mapping[str, Any] | None = None,
) -> list[dict]:
    """Evaluates every model at every step count and setting of the sampler, on each set of prompts: one row each.

    `steps` are numbers, or "auto" of models that choose them. guidance None is the model's own and 1 (none);
    temperature, mask schedule, reveal order and the share of tokens to revise None are its own.
    Prompts are files of lines or lists: without any, the sets "seen" and "held-out" are the embedded model's two lists;
    `prompts` alone is evaluated alone, as "given", and `held_out` beside it as "given held-out". `count` pictures of
    each prompt for each of `seeds` seeds; picture i of a seed starts from the same noise whatever the model and the
    settings. `quality` None leaves the reward out. `pictures` is the number of columns of the contact sheet, 0 for
    none, `figure` whether quality is plotted against calls. `compile` pays where there are many pictures.

    A row: model, prompts (the set), steps, guidance, temperature, schedule, order, revise, network_calls (one a step,
    two with guidance), seconds_per_image (median over seeds; text encoder and decoder included, in batches of `batch`,
    by default `fitting_batch`), and each of METRICS with METRIC_spread, the standard deviation over seeds (n - 1); None
    where it has no meaning. Where steps are "auto", network_calls is the mean of what the pictures took, so that it
    stands beside counts of as many calls, and there are steps_mean, steps_of_prompts, the mean of each prompt, and
    steps_std, their standard deviation over prompts.
    Writes out/results.json after each row, quality_against_calls.png and pictures.png, and prints a table. Rows that
    results.json already has for the same weights, prompts, judge and settings are not computed again, and other rows
    stay in the file unless their model's weights have changed. ValueError or FileNotFoundError for bad input, before
    anything is computed.
    """
    out, models = Path(out), list(dict.fromkeys(map(str, models)))
    if not models:
        raise ValueError("there is no model to evaluate: give at least one")
    if not steps or any(s != "auto" and s < 1 for s in steps):
        raise ValueError(f"step counts must be at least 1, got {list(steps)}")
    if min(count, seeds, 1 if batch is None else batch) < 1:
        raise ValueError(f"count, seeds and batch must be at least 1, got {count}, {seeds} and {batch}")
    for kind in schedule or ():
        mask_ratio(torch.zeros(()), kind=kind)
    if unknown := [kind for kind in order or () if kind not in ORDERS]:
        raise ValueError(f"unknown reveal order {unknown[0]!r}: choose confidence, random or halton")
    for share in revise or ():
        check_share(share)
    sets = prompt_sets(prompts, held_out)
    weights = {model: fingerprint(*parts_of(model)) for model in models}
    if "auto" in steps and (fixed := [model for model in models if not chooses_steps(model)]):
        raise ValueError(f"{fixed[0]} does not choose its steps: give numbers, or models of train --steps auto")
    check_device(device)
    kept = read_results(out / "results.json")
    kept = {key: row for key, row in kept.items() if weights.get(row["model"], row["weights"]) == row["weights"]}
    console = Console()
    judge = judge_if_there(device, console)
    tried = {"prompts": next(iter(sets.values()))}
    scores = load_qualities(quality, device=device, weights=reward_weights, **tried)[0] if quality else {}
    judged_by = fingerprint(EMBEDDED.parent / "judge", *(EMBEDDED if n == "embedded" else Path(n) for n in scores))
    scored_by = [(line, *dated(Path(line.partition("=")[2]))) for line in reward_weights]
    how = sorted((name, str(value)) for name, value in (loading or {}).items())

    rows, sheet, labels, done = [], [], [], 0
    shown = next(iter(sets.values()))[:pictures]
    bar = (BarColumn(), TaskProgressColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *bar, console=console, transient=True) as progress:
        task = progress.add_task("loading", total=None)
        for number, model in enumerate(models):
            generator = load_generator(model, device=device, **(loading or {}))
            strengths = list(dict.fromkeys(guidance or (generator.guidance, 1.0)))
            heats = list(dict.fromkeys(temperature or (generator.temperature,)))
            kinds, turns = schedule or (generator.schedule,), order or (generator.order,)
            sampler = list(dict.fromkeys(itertools.product(kinds, turns, revise or (generator.revise,))))
            for chosen, s in itertools.product(sampler, dict.fromkeys(steps)) if shown else ():
                progress.update(task, description=f"{shorten(model)}: pictures")
                options = {"guidance": strengths[0], "temperature": heats[0]} | dict(zip(USUAL, chosen, strict=True))
                sheet.append(sample(generator, shown, steps=s, **options).cpu())
                which = f", {sampler_words(chosen)}" if len(sampler) > 1 else ""
                labels.append(f"{shorten(model)}, {s} step{'s' * (s != 1)}{which}")
            if compile:  # after the contact sheet, whose few pictures would not pay for it
                torch.compiler.reset()  # after the networks of a few models the compiler would give up
                generator.transformer.compile_blocks()
            todo = []
            every = itertools.product(sets, strengths, heats, sampler, dict.fromkeys(steps))
            for which, g, t, chosen, s in every:
                calls = network_calls(generator.pace.most if s == "auto" else s, g)  # the most, until counted
                row = {"model": model, "prompts": which, "steps": s, "guidance": float(g), "temperature": float(t)}
                row |= dict(zip(USUAL, chosen, strict=True)) | {"network_calls": calls, "weights": weights[model]}
                settings = json.dumps([row, sets[which], count, seeds, quality, scored_by, judged_by, device, how])
                row["settings"] = hashlib.sha256(settings.encode()).hexdigest()[:16]
                old = kept.get(identity(row), {})
                rows.append(old if old.get("settings") == row["settings"] else row)
                if rows[-1] is row:
                    todo.append(row)
            effort = [len(sets[row["prompts"]]) * (row["network_calls"] + 2) for row in todo]
            # the models to come are taken to cost as much as this one
            progress.update(task, total=done + sum(effort) * (len(models) - number), completed=done)
            for row, cost in zip(todo, effort, strict=True):
                label = f"{shorten(model)}: {row['steps']} steps, guidance {row['guidance']:g}, {row['prompts']}"
                progress.update(task, description=label)
                row |= one_cell(
                    generator, judge, scores, sets[row["prompts"]], which=row["prompts"], steps=row["steps"],
                    guidance=row["guidance"], temperature=row["temperature"], schedule=row["schedule"],
                    order=row["order"], revise=row["revise"], count=count, seeds=seeds, batch=batch,
                    after_seed=lambda cost=cost: progress.advance(task, cost / seeds),
                )  # fmt: skip
                done += cost
                kept[identity(row)] = row
                write_json(out / "results.json", list(kept.values()))
    if figure:
        plot(rows, out / "quality_against_calls.png", real=judge.real if judge else None)
    if sheet:
        scale = max(1, 128 // sheet[0].shape[-1])
        save_png(contact_sheet(sheet, labels=labels, titles=shown, scale=scale), out / "pictures.png")
    console.print(table(rows, width=console.width))
    written = ["results.json", *["quality_against_calls.png"] * figure, *["pictures.png"] * bool(sheet)]
    console.print(f"wrote {', '.join(written)} in {out}")
    return rows


def one_cell(
    generator: Generator,
    judge: Judge | None,
    scores: dict[str, Score],
    prompts: list[str],
    *,
    which: str,
    steps: int | str,
    guidance: float,
    temperature: float,
    count: int,
    seeds: int,
    batch: int | None,
    after_seed: Callable[[], object],
    schedule: str | None = None,
    order: str | None = None,
    revise: float | None = None,
) -> dict[str, float | None]:
    """seconds_per_image, METRICS and their spread, of `count` pictures of each prompt for each seed 0 .. seeds - 1;
    with steps "auto" also what `evaluate` says of them."""
    wanted = [prompt for prompt in prompts for _ in range(count)]
    options = {"guidance": guidance, "temperature": temperature, "schedule": schedule, "order": order,
               "revise": revise, "batch": batch}  # fmt: skip
    # compilation and first calls stay out of the clock
    some = wanted[: fitting_batch(generator) if batch is None else batch]
    sample(generator, some, steps=1, **options)
    values, seconds, taken = [], [], []
    for seed in range(seeds):
        began = time.perf_counter()
        tokens, took = draw(generator, wanted, steps=steps, seed=seed, **options)
        images = decode(generator, tokens).cpu()
        seconds.append((time.perf_counter() - began) / len(wanted))
        values.append(measure(judge, scores, images.unflatten(0, (-1, count)), prompts, which=which))
        taken.append(took.cpu())
        after_seed()
    counted = steps_taken(torch.stack(taken).unflatten(1, (-1, count)), guidance) if steps == "auto" else {}
    return {"seconds_per_image": statistics.median(seconds)} | counted | over_seeds(values)


def steps_taken(taken: Tensor, guidance: float) -> dict[str, Any]:
    """What a row says of the steps int64 [seeds, P, n] that n pictures of each of P prompts took, for their calls."""
    mean, of_prompts = taken.double().mean().item(), taken.double().mean((0, 2)).tolist()
    std = statistics.stdev(of_prompts) if len(of_prompts) > 1 else None
    calls = network_calls(1, guidance) * mean
    return {"network_calls": calls, "steps_mean": mean, "steps_std": std, "steps_of_prompts": of_prompts}


def measure(
    judge: Judge | None,
    scores: dict[str, Score],
    images: Tensor,
    prompts: list[str],
    *,
    which: str = "seen",
) -> dict[str, float | None]:
    """METRICS of pictures [P, n, 3, H, W] in [0, 1], n of each of P prompts; None where one has no meaning.

    reward: the mean quality; where there are several each has its name instead. judge_r1, judge_r5: the share of
    pictures that show a concept of their prompt, over the prompts that name one. frechet: to the real pictures of the
    prompts `which`, so for those two sets alone. diversity and pixel_diversity: within a prompt, for n of 2 or more.
    ValueError where P differs.
    """
    if len(images) != len(prompts):
        raise ValueError(f"pictures of {len(images)} prompts for {len(prompts)} prompts")
    n, found = images.shape[1], dict.fromkeys(METRICS)
    flat, repeated = images.flatten(0, 1), [prompt for prompt in prompts for _ in range(n)]
    for name, score in scores.items():
        found[name if len(scores) > 1 else "reward"] = float(score(flat, repeated).float().mean())
    if n > 1:
        found["pixel_diversity"] = pixel_diversity(images)
    if judge is None:
        return found
    values = features(judge, flat)
    if n > 1:
        found["diversity"] = diversity(judge, values.unflatten(0, images.shape[:2]))
    concepts = [concepts_in(prompt, judge.names) for prompt in repeated]
    named = [i for i, concept in enumerate(concepts) if concept]
    if named:
        first, five = recall(judge, values[named], [concepts[i] for i in named])
        found["judge_r1"], found["judge_r5"] = float(first.float().mean()), float(five.float().mean())
    if which in judge.real_mean and len(values) > 1:
        found["frechet"] = frechet(judge, values, prompts=which)
    return found


def over_seeds(values: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Mean of each metric over seeds, and METRIC_spread, its standard deviation (n - 1; None for one seed)."""
    row = {}
    for metric in dict.fromkeys(name for value in values for name in value):
        known = [value[metric] for value in values if value.get(metric) is not None]
        row[metric] = statistics.fmean(known) if known else None
        row[f"{metric}_spread"] = statistics.stdev(known) if len(known) > 1 else None
    return row


def network_calls(steps: int, guidance: float) -> int:
    """Network calls of one picture: one a step, two with guidance."""
    return steps * (1 if guidance == 1 else 2)


def prompt_sets(
    prompts: str | Path | Sequence[str] | None, held_out: str | Path | Sequence[str] | None
) -> dict[str, list[str]]:
    """The prompts of each set, as `evaluate` says. ValueError for an empty list."""

    def lines(source: str | Path | Sequence[str]) -> list[str]:
        found = read_prompts(source) if isinstance(source, str | Path) else [line for line in source if line.strip()]
        if not found:
            raise ValueError("the list of prompts is empty: give at least one")
        return found

    own = Path(__file__).parents[1] / "models" / "embedded" / "prompts"
    sets = {"seen": lines(own / "eval.txt")} if prompts is None else {"given": lines(prompts)}
    if held_out is not None:
        sets["given held-out"] = lines(held_out)
    elif prompts is None:
        sets["held-out"] = lines(own / "held_out.txt")
    return sets


def judge_if_there(device: str, console: Console) -> Judge | None:
    try:
        return load_judge(device=device)
    except FileNotFoundError as error:
        console.print(f"no judge, so no recall, Fréchet distance or diversity: {error}")
        return None


def fingerprint(*folders: Path) -> str:
    """Hash of the files in these folders: a model trained anew under its old name is another one."""
    digest = hashlib.sha256()
    for path in (path for folder in folders for path in sorted(folder.glob("*")) if path.is_file()):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def dated(path: Path) -> tuple[int, int]:
    """Size and time of change of a file too large to be read for its hash."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def identity(row: dict) -> tuple:
    """What a row of results.json is about: there is one for each."""
    return tuple(row[name] for name in ("model", "prompts", "steps", "guidance", "temperature")) + sampler_of(row)


def sampler_of(row: dict) -> tuple[str, str, float]:
    """What a row has of USUAL; rows of before there was a choice have what there was."""
    return tuple(row.get(name, usual) for name, usual in USUAL.items())


def sampler_words(sampler: Sequence) -> str:
    """A sampler's settings, in the order of USUAL, for a label."""
    schedule, order, share = sampler
    return f"{schedule}, {order}" + f", revised {share:g}" * bool(share)


def read_results(path: Path) -> dict[tuple, dict]:
    """The rows of an earlier results.json by their identity. ValueError where it is no such file."""
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {identity(row): row for row in rows if row["settings"] and row["weights"]}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{path} is not an evaluation's result: move it away, or give another folder") from None


def shorten(model: str, *, width: int = 28) -> str:
    """A model's name for tables: its end, where it is long, without the folder that every run has."""
    model = model.removesuffix("/model")
    return model if len(model) <= width else "…" + model[1 - width :]


def metrics_of(rows: list[dict]) -> dict[str, str]:
    """Titles of the metrics that any row has: qualities with a name of their own, then METRICS."""
    own = [name.removesuffix("_spread") for row in rows for name in row if name.endswith("_spread")]
    titles = {name: name for name in own if name not in METRICS} | METRICS
    return {name: title for name, title in titles.items() if any(row.get(name) is not None for row in rows)}


def calls_of(row: dict) -> str:
    """A row's network calls as text, with one decimal where they are a mean."""
    calls = row["network_calls"]
    return str(calls) if isinstance(calls, int) else f"{calls:.1f}"


def columns_of(rows: list[dict], *, spreads: bool = True, error: str = "spread") -> tuple[list[str], list[list[str]]]:
    """A header and a line of text for each row, ± METRIC_`error`; metrics that no row has are left out."""
    shown = metrics_of(rows)

    def number(row: dict, name: str) -> str:
        value, spread = row.get(name), row.get(f"{name}_{error}")
        digits = 1 if name == "frechet" else 3
        text = "–" if value is None else f"{value:.{digits}f}"
        return text if spread is None or not spreads else f"{text} ±{spread:.{digits}f}"

    sampler = [name for name, usual in USUAL.items() if any(row.get(name, usual) != usual for row in rows)]
    header = ["model", "prompts", "steps", "guidance", "temperature", *sampler, "calls", "s/image", *shown.values()]
    lines = [
        [shorten(row["model"]), row["prompts"], str(row["steps"]), f"{row['guidance']:g}", f"{row['temperature']:g}",
         *(str(row.get(name, USUAL[name])) for name in sampler), calls_of(row), f"{row['seconds_per_image']:.3f}",
         *(number(row, name) for name in shown)]
        for row in rows
    ]  # fmt: skip
    return header, lines


def table(rows: list[dict], *, width: int = 160) -> Table:
    """Rows for a terminal of `width` columns; a narrow one gets short titles, no spreads and no pixel diversity."""
    wide = width >= 140
    header, lines = columns_of(rows, spreads=wide)
    short = {"guidance": "cfg", "temperature": "temp", "s/image": "s/img", "diversity": "div."}
    shown = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2 if wide else 1, 0, 0))
    kept = [i for i, title in enumerate(header) if wide or title != METRICS["pixel_diversity"]]
    for i in kept:
        title = header[i] if wide else short.get(header[i], header[i])
        shown.add_column(title, justify="right" if i > 1 else "left", overflow="fold", no_wrap=i > 0,
                         min_width=0 if i else 8)  # fmt: skip
    for line in lines:
        shown.add_row(*(line[i] for i in kept))
    return shown


def markdown(rows: list[dict], *, error: str = "spread") -> str:
    """Rows as a table in Markdown."""
    header, lines = columns_of(rows, error=error)
    rule = ["---" if i < 2 else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines)) + "\n"


def plot(rows: list[dict], path: Path, *, real: dict | None = None) -> None:
    """Quality against network calls into a PNG: a row of panels for each set of prompts, a column for each metric.

    A curve for each model and setting of the sampler, told apart by marker and dash as well as by colour; bars are the
    spread over seeds. `real` is judge.real: a broad grey line where real pictures are.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no window

    sets = list(dict.fromkeys(row["prompts"] for row in rows))
    titles = metrics_of(rows)
    metrics = [metric for metric in titles if metric != "judge_r5"]
    if not metrics:
        return

    def curve(row: dict) -> tuple:
        return row["model"], row["guidance"], row["temperature"], row["steps"] == "auto", *sampler_of(row)

    curves = list(dict.fromkeys(map(curve, rows)))
    heats, samplers = {key[2] for key in curves}, {key[4:] for key in curves}
    figure = Figure(figsize=(3.4 * len(metrics), 2.9 * len(sets) + 0.3 * len(curves)), layout="constrained", dpi=130)
    axes = figure.subplots(len(sets), len(metrics), squeeze=False)
    ticks = {row["network_calls"]: calls_of(row) for row in sorted(rows, key=lambda row: row["network_calls"])}
    for (i, which), (j, metric) in ((a, b) for a in enumerate(sets) for b in enumerate(metrics)):
        panel = axes[i][j]
        for k, key in enumerate(curves):
            model, guidance, temperature, auto, *sampler = key
            points = sorted(
                (row["network_calls"], row[metric], row.get(f"{metric}_spread") or 0)
                for row in rows
                if curve(row) == key and row["prompts"] == which and row.get(metric) is not None
            )
            if points:
                label = f"{shorten(model)}{', auto' * auto}, guidance {guidance:g}"
                label += f", temperature {temperature:g}" if len(heats) > 1 else ""
                label += f", {sampler_words(sampler)}" if len(samplers) > 1 else ""
                calls, values, spreads = zip(*points, strict=True)
                panel.errorbar(
                    calls, values, yerr=spreads, label=label,
                    marker="osD^vPX*<>"[k % 10], linestyle=("-", "--", "-.", (0, (1, 1)))[k % 4], color=f"C{k % 10}",
                    markersize=5, linewidth=1.4, capsize=2,
                )  # fmt: skip
        if real and real.get(which, {}).get(metric) is not None:
            panel.axhline(real[which][metric], color="0.75", linewidth=4, zorder=0, label="real pictures")
        panel.set_xscale("log", base=2)
        panel.set_xticks(list(ticks), list(ticks.values()))
        panel.grid(alpha=0.3)
        panel.set_title(f"{titles[metric]}, {which} prompts", fontsize=10)
        panel.set_xlabel("network calls a picture" if i == len(sets) - 1 else "")
    pairs = [pair for panel in axes.flat for pair in zip(*panel.get_legend_handles_labels(), strict=True)]
    known = {label: handle for handle, label in pairs}
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    write_atomically(path, lambda partial: figure.savefig(partial, format="png"))
