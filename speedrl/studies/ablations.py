"""Ablations: train variants that differ in one thing, evaluate each, and put them into one report."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from speedrl.evaluation.measuring import (
    METRICS,
    columns_of,
    evaluate,
    markdown,
    metrics_of,
    over_seeds,
    prompt_sets,
    table,
)
from speedrl.evaluation.pages import Section, write_page
from speedrl.evaluation.reports import plot_curves
from speedrl.generation import sample
from speedrl.method.schedules import step_range
from speedrl.models.checkpoint import load_generator
from speedrl.rewards.loading import load_qualities
from speedrl.studies.intervals import caution, interval, paired, say
from speedrl.studies.runs import commands_of, metrics_file, refuse_other, run_all, run_folder
from speedrl.system.files import write_atomically, write_json
from speedrl.training import train, training_prompts

MEDIAN, QUARTILE = "median", "lower quartile"  # of the starting model's quality, in place of a number
SIXFOLD = "sixfold"  # the iterations of the other variants
COMPARED = ("reward", "judge_r1", "diversity")  # what is said in words
CURVES = {"quality": "quality of the rollouts", "kl": "divergence from the start, nats a token"}


def ablations() -> dict[str, dict[str, dict]]:
    """Every ablation by name: its variants, each with the options of `train` that it sets; the first is the baseline.

    "median" and "lower quartile" stand for those of the quality of the starting model's own pictures, as a number that
    fits one reward means nothing to another, "sixfold" for six times the iterations that the others have.

    speed-reward: the paper's first question. Where step counts are fixed or drawn from a range, the policy does not
    choose them, and the speed reward's expected gradient is 0 (see `speed_reward`): it can only shift the baselines.
    With the gate it depends on the quality, and it has one. There every sample draws a count of its own and has one
    advantage, as among samples of one count the speed reward is the same for all; shared-steps compares the two.
    likelihood: sequence and exact have the credit of whole rollouts, so token is there with it too.
    any-count: one training for every step count, of as many network calls as the five for one alone that it is beside
    have together (5.2 steps in the mean, for 6.2); measure it at --eval-steps 1,2,4,8,16.
    kl: in 4 steps each weight is a sixteenth of what it says (`count_weights`).
    group-size: always 64 pictures an iteration. guidance: in rollouts and in scoring alike.
    """
    drawn = {"steps": "2-16", "shared_steps": False, "credit": "rollout"}
    speed = {f"2-16 steps, speed {weight:g}": drawn | {"steps_reward": weight} for weight in (0, 0.1, 0.25, 0.5, 1)}
    gated = {"2-16 steps, speed 0.5, gated": drawn | {"steps_reward": 0.5, "quality_gate": MEDIAN}}
    fixed = {f"4 steps, speed {weight:g}": {"steps": "4", "steps_reward": weight} for weight in (0, 0.5)}
    weights = {f"ce, weight {weight:g}": {"kl": "ce", "kl_weight": weight} for weight in (0.2, 0.03, 0.8, 3.2)}
    return {
        "speed-reward": speed | gated | fixed,
        "shared-steps": {"a count for each group": drawn | {"shared_steps": True}, "a count for each sample": drawn},
        "kl": weights
        | {f"{kind}, weight 0.2": {"kl": kind, "kl_weight": 0.2} for kind in ("reverse", "k2", "k3")}
        | {"none": {"kl": "none"}},
        "credit": {"of a token": {"credit": None}}
        | {f"of a step, lambda {x:g}": {"credit": "step", "gae_lambda": x} for x in (0.0, 0.5, 1.0)}
        | {"of a rollout": {"credit": "rollout"}},
        "tuning": {"learned": {"tune": True}, "hand-set": {"tune": False}},
        "likelihood": {"token": {"likelihood": "token"}, "sequence": {"likelihood": "sequence"}}
        | {"exact": {"likelihood": "exact"}, "token, credit of a rollout": {"credit": "rollout"}},
        "percentile": {f"percentile {p:g}": {"percentile": p} for p in (0.0, 25.0, 50.0, 75.0)},
        "low-quality": {
            "all train": {"least_quality": None},
            "not the lowest quarter": {"least_quality": QUARTILE},
            "not the lower half": {"least_quality": MEDIAN},
        },
        "group-size": {f"{64 // n} groups of {n}": {"groups": 64 // n, "group_size": n} for n in (8, 4, 16, 32)},
        "guidance": {f"guidance {g:g}": {"guidance": g} for g in (1.0, 1.5, 2.0, 4.0)},
        "trained-steps": {f"{n or 'all'} steps train": {"trained": n} for n in (None, 3, 2, 1)},
        "lr": {f"lr {lr:g}": {"lr": lr} for lr in (5e-5, 1e-5, 2e-5, 1e-4)}
        | {f"Adam's eps 1e-3, lr {lr:g}": {"lr": lr, "eps": 1e-3} for lr in (5e-4, 2e-3)},
        "any-count": {"1-16 steps": {"steps": "1-16", "iterations": SIXFOLD}}
        | {f"{n} steps": {"steps": str(n)} for n in (1, 2, 4, 8, 16)},
        "order": {"the model's order": {"order": None}, "random": {"order": "random"}, "halton": {"order": "halton"}},
    }


def variants(name: str) -> dict[str, dict]:
    """The variants of a named ablation. ValueError for no such name."""
    known = ablations()
    if name not in known:
        raise ValueError(f"unknown ablation {name!r}: choose {', '.join(known)} or all")
    return known[name]


def ablate(
    name: str = "all",
    *,
    out: str | Path = "runs/ablate",
    seeds: Sequence[int] = (0, 1, 2),
    model: str = "embedded",
    device: str = "cpu",
    jobs: int = 1,
    quick: bool = False,
    eval_steps: Sequence[int] = (4, 8, 16),
    eval_count: int = 4,
    eval_seeds: int = 1,
    evaluation: Mapping[str, Any] | None = None,
    **options,
) -> list[dict]:
    """Trains every variant of an ablation, or of all, from every seed and evaluates it: a row for variant and setting.

    `options` go to `train` for all variants; an ablation's own go before them, but one alone refuses them (ValueError).
    `evaluation` are further options of `evaluate`. The model they start from is evaluated too, as "start". `jobs` runs
    go at a time, each in a process of its own that writes to log.txt in its folder; `device` may be several with commas
    between them, which the jobs share out. `quick` tries the machinery: one iteration of four pictures, one seed.

    A run lies in OUT/runs/OPTIONS/seed-N, so that ablations share what they have in common: a finished one is kept, an
    interrupted one goes on, one of other options is refused (ValueError). One that fails is reported, and the others go
    on. OUT/report, or OUT/report-NAME of one alone, has index.html, and for each ablation NAME.json, NAME.md, and
    NAME.png and .svg, the curves over iterations.

    A row is as in `evaluate`, with the variant as its model, each metric's mean over training seeds, METRIC_spread,
    their standard deviation (n - 1; None for one seed), not that over sampling seeds, and METRIC_interval, half the
    width of the 95 % interval of the mean. ValueError where no variant ran.
    """
    out, console = Path(out), Console()
    if not seeds:
        raise ValueError("there is no seed to train from: give at least one")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    chosen = {name: variants(name)} if name != "all" else ablations()
    own_of = chosen.get(name, {}).values()
    clash = {key for own in own_of for key, value in own.items() if key in options and value != SIXFOLD}
    if clash:
        raise ValueError(f"the ablation {name} sets {', '.join(sorted(clash))} itself")
    evaluation = {
        "steps": tuple(eval_steps),
        "count": eval_count,
        "seeds": eval_seeds,
        "pictures": 0,
        "figure": False,
        "revise": (options.get("revise", 0.0),),  # of the trained and of what they started from alike
        **(evaluation or {}),
    }
    if quick:
        seeds, options = tuple(seeds)[:1], hurried(options)
        prompts = next(iter(prompt_sets(evaluation.get("prompts"), None).values()))[:4]
        write_atomically(
            out / "prompts.txt", lambda partial: partial.write_text("\n".join(prompts) + "\n", encoding="utf-8")
        )
        evaluation |= {"steps": (2,), "count": 2, "seeds": 1, "guidance": (1.0,), "prompts": str(out / "prompts.txt")}
    evaluation = {key: options[key] for key in ("quality", "reward_weights") if key in options} | evaluation
    shared = options | {"model": model}
    levels = {SIXFOLD: 6 * (train.__kwdefaults__ | options)["iterations"]}
    if any(value in (MEDIAN, QUARTILE) for own in flat(chosen) for value in own.values()):
        levels |= quality_levels(out / "start", shared, device=device.split(",")[0])
    plan = {}  # only what differs from the default, so that a run is the same whichever ablation asks for it
    for which, own_of in chosen.items():
        for variant, own in own_of.items():
            apart = difference(own, shared)
            options_of = shared | {key: levels.get(value, value) for key, value in apart.items()}
            for seed in seeds:
                plan[which, variant, seed] = run_folder(out, apart, seed), options_of | {"seed": seed}
    runs = dict(plan.values())
    for folder, own in runs.items():
        refuse_other(folder, own)

    began = time.time()
    beginning = evaluate([model], out=out / "start", device=device.split(",")[0], **evaluation)
    outcome = run_all(runs, evaluation=evaluation, devices=device.split(","), jobs=jobs, console=console)
    every, sections = [], []
    report = out / ("report" if name == "all" else f"report-{name}")
    for which, own_of in chosen.items():
        of = {v: {seed: plan[which, v, seed][0] for seed in seeds} for v in own_of}
        rows, part = conclude(which, of, outcome, beginning, report=report, evaluation=evaluation, runs=runs)
        console.print(table(rows, width=console.width))
        every += rows
        sections.append(part)
    minutes = (time.time() - began) / 60
    about = f"Seeds {', '.join(map(str, seeds))}. This call took {minutes:.0f} minutes; finished runs were kept."
    write_page(report / "index.html", f"Ablations of {model}", [Section("What this is", [about]), *sections])
    console.print(f"wrote {report / 'index.html'}", soft_wrap=True, highlight=False)
    if failed := {folder: why for folder, why in outcome.items() if isinstance(why, str)}:
        console.print(f"{len(failed)} of {len(runs)} runs failed", highlight=False)
        if len(failed) == len(runs):
            raise ValueError(f"no variant of {name} ran: {'; '.join(sorted(set(failed.values())))}")
    return every


def hurried(options: dict) -> dict:
    """Options of a training that shows only that it runs; what is given stays."""
    return {"iterations": 1, "groups": 2, "group_size": 2, "compile": False} | options


def flat(chosen: Mapping[str, Mapping[str, dict]]) -> list[dict]:
    return [own for variants_of in chosen.values() for own in variants_of.values()]


def difference(own: dict, shared: dict) -> dict:
    """The options of a variant that are not those of a run without it: {} for a baseline that is the default."""
    default = train.__kwdefaults__ | shared
    return {name: value for name, value in own.items() if name not in default or value != default[name]}


def quality_levels(folder: Path, options: dict, *, device: str, pictures: int = 64) -> dict[str, float]:
    """Median and lower quartile of the quality of pictures that the starting model draws of training prompts.

    Measured once and kept in FOLDER/levels.json, as the variants' options must stay what they were. Of several
    qualities, which training standardises, they are those of a normal distribution.
    """
    path = folder / "levels.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    defaults = train.__kwdefaults__ | options
    scores, _ = load_qualities(defaults["quality"], device=device, weights=defaults["reward_weights"])
    if len(scores) > 1:
        found = {MEDIAN: 0.0, QUARTILE: round(statistics.NormalDist().inv_cdf(0.25), 4)}
    else:
        generator = load_generator(defaults["model"], device=device, **(defaults["loading"] or {}))
        texts = list(training_prompts(defaults["model"], defaults["prompts"]))
        texts = (texts * pictures)[:pictures]
        steps = step_range(defaults["steps"])[1]
        images = sample(generator, texts, steps=steps, guidance=defaults["guidance"])
        quality = next(iter(scores.values()))(images, texts).float().cpu()
        found = {MEDIAN: round(quality.median().item(), 4), QUARTILE: round(quality.quantile(0.25).item(), 4)}
    write_json(path, found)
    return found


def conclude(
    name: str,
    folders: Mapping[str, Mapping[int, Path]],
    outcome: Mapping[Path, list[dict] | str],
    beginning: list[dict],
    *,
    report: Path,
    evaluation: dict,
    runs: Mapping[Path, dict],
) -> tuple[list[dict], Section]:
    """One ablation's rows and its part of the page; writes its files to `report`. `folders` by variant and seed."""
    measured = {
        variant: {seed: outcome[folder] for seed, folder in by_seed.items() if not isinstance(outcome[folder], str)}
        for variant, by_seed in folders.items()
    }
    failed = {
        f"{variant}, seed {seed}": outcome[folder]
        for variant, by_seed in folders.items()
        for seed, folder in by_seed.items()
        if isinstance(outcome[folder], str)
    }
    rows = over_runs("start", [beginning])
    rows += [row for variant, by_seed in measured.items() for row in over_runs(variant, list(by_seed.values()))]
    baseline = next(iter(folders))
    differences = [d for variant in measured if variant != baseline for d in compared(variant, baseline, measured)]
    words = in_words(differences, baseline=baseline)
    curves = {
        variant: {seed: metrics_file(folders[variant][seed]) for seed in by_seed}
        for variant, by_seed in measured.items()
        if by_seed
    }
    commands = [
        line for by_seed in folders.values() for f in by_seed.values() for line in commands_of(f, runs[f], evaluation)
    ]
    commands = list(dict.fromkeys(commands))
    complaints = [f"Failed: {run}: {why}" for run, why in failed.items()]
    write_json(
        report / f"{name}.json",
        {
            "ablation": name,
            "failed": failed,
            "rows": rows,
            "differences": differences,
            "words": words,
            "commands": commands,
        },
    )
    paragraphs = "".join(f"\n{line}\n" for line in (*words, *complaints))
    code = "".join(f"    {line}\n" for line in commands)
    text = f"# {name}\n\n{markdown(rows, error='interval')}\n± is the 95 % interval over seeds.\n{paragraphs}\n{code}"
    write_atomically(report / f"{name}.md", lambda partial: partial.write_text(text, encoding="utf-8"))
    if curves:
        plot_curves(curves, report / name, metrics=CURVES, title=name)
    caption = f"{name}: means over seeds, and seed for seed what sets each apart, with 95 % intervals"
    section = Section(
        title=name,
        words=[*words, *complaints],
        pictures=[(f"{name}.png", caption)] if curves else [],
        tables=[columns_of(rows, error="interval")],
        commands=commands,
        files=[f"{name}.json", f"{name}.md", *([f"{name}.svg"] if curves else [])],
    )
    return [row | {"ablation": name} for row in rows], section


def over_runs(variant: str, runs: list[list[dict]]) -> list[dict]:
    """The rows of several trainings of one variant as one list: means, spreads and intervals over the trainings."""
    rows = []
    for same in zip(*runs, strict=True):
        row = {key: value for key, value in same[0].items() if key not in ("weights", "settings")} | {"model": variant}
        metrics = metrics_of(list(same))
        row |= over_seeds([{name: one.get(name) for name in metrics} for one in same])
        for metric in metrics:
            known = [one[metric] for one in same if one.get(metric) is not None]
            row[f"{metric}_interval"] = interval(known)[1] if known else None
        row["seconds_per_image"] = statistics.fmean(one["seconds_per_image"] for one in same)
        rows.append(row | {"runs": len(same)})
    return rows


def cell(row: dict) -> tuple:
    """What two rows must share to be compared: prompts and the cost of a picture."""
    return row["prompts"], row["steps"], row["network_calls"]


def compared(variant: str, baseline: str, measured: Mapping[str, Mapping[int, list[dict]]]) -> list[dict]:
    """Differences of a variant from the baseline, paired by seed, for each of COMPARED at every common setting."""
    found = []
    for key in dict.fromkeys(cell(row) for rows in measured[variant].values() for row in rows):
        for metric in COMPARED:
            values, others = (
                {s: row[metric] for s, rows in measured[which].items() for row in rows
                 if cell(row) == key and row.get(metric) is not None}
                for which in (variant, baseline)
            )  # fmt: skip
            if values.keys() & others.keys():
                setting = dict(zip(("prompts", "steps", "network_calls"), key, strict=True))
                found.append({"variant": variant, **setting, "metric": metric, **paired(values, others)})
    return found


def in_words(differences: list[dict], *, baseline: str) -> list[str]:
    """A paragraph for each variant, and how far to trust them all."""
    if not differences:
        return []
    paragraphs = []
    for variant in dict.fromkeys(found["variant"] for found in differences):
        own = [found for found in differences if found["variant"] == variant]
        sentences = []
        for key in dict.fromkeys((found["prompts"], found["steps"], found["network_calls"]) for found in own):
            here = [f for f in own if (f["prompts"], f["steps"], f["network_calls"]) == key]
            said = "; ".join(say(METRICS[found["metric"]], found) for found in here)
            sentences.append(f"{key[0]} prompts, {key[1]} steps ({key[2]} calls): {said}")
        paragraphs.append(f"{variant}, against {baseline}. {'. '.join(s[0].upper() + s[1:] for s in sentences)}.")
    return [*paragraphs, caution(differences)]
