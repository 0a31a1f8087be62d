"""Ablations: train variants that differ in one thing, evaluate each, and put them into one report."""

import ast
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from speedrl.evaluation.measuring import (
    METRICS,
    evaluate,
    grid,
    markdown,
    metrics_of,
    over_seeds,
    prompt_sets,
    table,
)
from speedrl.run.shared_options import PROMPTS, QUALITY, Model
from speedrl.studies.intervals import caution, interval, paired
from speedrl.studies.plots import plot_curves
from speedrl.studies.runs import DEFAULTS, commands_of, metrics_file, refuse_other, run_all, run_folder
from speedrl.system.files import write_atomically, write_json
from speedrl.system.options import Opt, check_options, listed

AGAIN = "the baseline again"  # with other seeds: what two arms differ by that are the same
OFFSET = 1000  # of its seeds
TITLES = METRICS | {"network_evaluations": "NFE"}
COMPARED = ("reward", "judge_r1", "judge_margin", "diversity", "ground", "network_evaluations")
CURVES = {"quality": "quality of the rollouts", "steps": "steps of the rollouts", "kl": "divergence, nats a token"}


def all_ablations() -> dict[str, dict[str, dict]]:
    """Every ablation by name: its variants, each with the options of `train` that it sets.

    The first variant is the baseline: the default, but with `steps_reward` 4 in speed-reward, likelihood and method.
    AGAIN is the baseline with other seeds (an A/A pair): a difference no larger than its own is no result. group-size:
    always 128 images an iteration. method: what each part of the method gives; "no reward" trains by the divergence
    from the guided reference alone.
    """

    def each(option: str, *values: Any) -> dict[str, dict]:
        words = option.replace("_", " ")
        return {f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}": {option: value}
                for value in values}

    weights = {f"ce, weight {weight:g}": {"kl": "ce", "kl_weight": weight} for weight in (0.2, 0.05, 0.8, 3.2)}
    fast: dict[str, Any] = {"steps_reward": 4.0}
    token = fast | {"likelihood": "token"}
    kinds = {f"{kind}, weight 0.2": {"kl": kind, "kl_weight": 0.2} for kind in ("reverse", "k2", "k3")}
    found: dict[str, dict[str, dict]] = {
        "speed-reward": each("steps_reward", 4.0, 0.5, 0.08, 0.0),
        "likelihood": {"token": token, "exact": fast | {"likelihood": "exact"}}
        | {"token, random order": token | {"order": "random"}, "token, 4 updates": token | {"updates": 4}}
        | {"sequence, 4 updates": fast | {"likelihood": "sequence", "updates": 4}},
        "hindsight": each("hindsight", 1.0, 0.0) | {"hindsight alone": {"quality": "none"}},
        "shared-noise": {"shared noise": {"shared_noise": None}, "independent noise": {"shared_noise": False}},
        "kl": weights | kinds | {"none": {"kl_weight": 0.0}},
        "percentile": each("percentile", 10.0, 0.0, 25.0, 50.0, 75.0),
        "low-quality": each("min_quality", -2.0, float("-inf"), -1.0, 0.0),
        "advantage-std": each("advantage_std", "group", "batch", "none"),
        "group-size": {f"{128 // n} groups of {n}": {"groups": 128 // n, "group_size": n} for n in (16, 4, 8, 32)},
        "train-steps": {f"{n or 'all'} steps train": {"train_steps": n} for n in (None, 8, 4, 2, 1)},
        "updates": each("updates", 1, 2, 4),
        "guidance": {"policy without, reference with guidance": {"guidance": None}}
        | {f"policy with guidance {g:g}": {"guidance": g} for g in (1.5, 2.0)}
        | {"both without": {"reference_guidance": 1.0}},
        "remask": {"half remasked": {"remask": None}} | each("remask", 0.0, 0.25, 0.75),
        "search": {f"{n} rounds of search": {"search": n} for n in (64, 0, 16)},
        "lr": each("lr", 1e-4, 2e-5, 5e-5, 2e-4),
        "method": {"GRPO": fast, "no reward": {"quality": "none"}}
        | {"exact likelihood": fast | {"likelihood": "exact"}, "hindsight": fast | {"hindsight": 1.0}},
        "order": {"the model's order": {"order": None}, "random": {"order": "random"}, "halton": {"order": "halton"}},
    }
    return {name: with_pair(variants_of) for name, variants_of in found.items()}


def with_pair(variants_of: dict[str, dict]) -> dict[str, dict]:
    """The variants of an ablation with AGAIN after the first."""
    (first, own), *others = variants_of.items()
    return {first: own, AGAIN: own, **dict(others)}


def ablate(
    name: Annotated[str, Opt(
        "speed-reward, likelihood, hindsight, shared-noise, kl, percentile, low-quality, advantage-std, group-size, "
        "train-steps, updates, guidance, remask, search, lr, order, method or all.", positional=True)] = "all",
    *,
    out: Annotated[str | Path, Opt("Folder of the runs and the report; finished runs are kept.",
                                   cli=Path)] = "runs/ablate",
    seeds: Annotated[str | Sequence[int], Opt("Seeds to train from, like 0,1,2.", cli=str)] = (0, 1, 2),
    model: Model = "embedded",
    beside: Annotated[Sequence[str], Opt("A model to measure beside the variants; may be repeated.",
                                         cli=list[str])] = (),
    device: Annotated[str, Opt("auto, cpu, cuda, or several for the jobs to share out, like cuda:0,cuda:1.")] = "cpu",
    jobs: Annotated[int, Opt("Runs at a time, each in a process of its own.", least=1)] = 1,
    quick: Annotated[bool, Opt("Only show that everything runs: one iteration of four images.")] = False,
    iterations: Annotated[int | None, Opt("Iterations of each training. [default: as train]")] = None,
    groups: Annotated[int | None, Opt("Prompts of an iteration. [default: as train]")] = None,
    group_size: Annotated[int | None, Opt("Images of each prompt. [default: as train]")] = None,
    lr: Annotated[float | None, Opt("Learning rate. [default: as train]")] = None,
    prompts: Annotated[Any, Opt(PROMPTS, cli=str | None)] = None,
    quality: Annotated[Any, Opt(f"{QUALITY}. [default: as train]", cli=str | None)] = None,
    set: Annotated[Sequence[str], Opt("OPTION=VALUE: any other option of train, like lora=16; may be repeated.",
                                      cli=list[str])] = (),
    eval_steps: Annotated[str | Sequence[int], Opt("Step counts to measure.", cli=str)] = (4, 8, 16),
    eval_count: Annotated[int, Opt("Images of each prompt and seed.", least=1)] = 4,
    eval_seeds: Annotated[int, Opt("Repetitions of each measurement.", least=1)] = 1,
    eval_prompts: Annotated[Any, Opt("Prompts to measure. [default: the embedded model's]", cli=str | None)] = None,
    evaluation: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[dict]:
    """Trains every variant of an ablation, or of all, from every seed and evaluates it: a row for variant and setting.

    `options`, and those of train that are given by name or in `set`, go to `train` for all variants; an ablation's own
    go before them, but what it is about is refused (ValueError).
    `evaluation` are further options of `evaluate`. The model they start from is evaluated too, as "start", and the
    models `beside`; trained ones with a step policy also at "auto" steps. All remask alike, by `remask` of the options
    or 0.5. `jobs` runs go at a time, each in a process of its own that writes to log.txt in its folder; `device` may be
    several with commas between them, which the jobs share out. `quick` tries the machinery: one iteration of four
    images, one seed.

    A run lies in OUT/runs/OPTIONS/seed-N, so that ablations share what they have in common: a finished one is kept, an
    interrupted one goes on, one of other options is refused (ValueError). One that fails is reported, and the others go
    on. OUT/report, or OUT/report-NAME of one alone, has for each ablation NAME.json, NAME.md, and NAME.png and .svg,
    the curves over iterations; OUT/report also report.md, which lists them.

    A row is as in `evaluate`, with the variant as its model, each metric's mean over training seeds, METRIC_spread,
    their standard deviation (n - 1; None for one seed), not that over sampling seeds, and METRIC_interval, half the
    width of the 95 % interval of the mean. ValueError where no variant ran.
    """
    named = {"iterations": iterations, "groups": groups, "group_size": group_size, "lr": lr, "prompts": prompts,
             "quality": quality}
    check_options(ablate, locals())
    out, console = Path(out), Console(markup=False, highlight=False)
    seeds, eval_steps = (listed(x, int, name=n) or () for x, n in ((seeds, "seeds"), (eval_steps, "eval_steps")))
    options = {k: v for k, v in named.items() if v is not None} | assignments(set) | options
    evaluation = ({} if eval_prompts is None else {"prompts": eval_prompts}) | dict(evaluation or {})
    known = all_ablations()
    if name != "all" and name not in known:
        raise ValueError(f"unknown ablation {name!r}: choose {', '.join(known)} or all")
    chosen = known if name == "all" else {name: known[name]}
    set_here = {*next(iter(chosen.get(name, {}).values()), {})}  # by the baseline: what the ablation is about
    if clash := sorted(set_here & options.keys()):
        flags = ", ".join(f"`{option}`" for option in clash)
        raise ValueError(f"the ablation {name} sets {flags} itself: leave it out")
    evaluation = {
        "steps": tuple(eval_steps), "count": eval_count, "seeds": eval_seeds, "images": 0, "figure": False,
        "remask": (0.5 if options.get("remask") is None else options["remask"],),
        **{key: options[key] for key in ("quality", "reward_weights") if key in options}, **(evaluation or {}),
    }
    if quick:
        seeds = tuple(seeds)[:1]
        options = {"iterations": 1, "groups": 2, "group_size": 2, "search": 0, "compile": False} | options
        prompts = "\n".join(next(iter(prompt_sets(evaluation.get("prompts"), None).values()))[:4]) + "\n"
        write_atomically(out / "prompts.txt", lambda partial: partial.write_text(prompts, encoding="utf-8"))
        evaluation |= {"steps": (2,), "count": 2, "seeds": 1, "guidance": (1.0,), "prompts": str(out / "prompts.txt")}
    shared = options | {"model": model}
    plan = {}  # only what differs from the default, so that a run is the same whichever ablation asks for it
    for which, own_of in chosen.items():
        for variant, own in own_of.items():
            apart = difference(own, shared)
            for seed in seeds:
                own_seed = seed + OFFSET if variant == AGAIN else seed
                plan[which, variant, seed] = run_folder(out, apart, own_seed), shared | apart | {"seed": own_seed}
    runs = dict(plan.values())
    for folder, own in runs.items():
        refuse_other(folder, own)

    began = time.time()
    beginning = evaluate([model, *beside], out=out / "start", device=device.split(",")[0], **evaluation)
    outcome = run_all(runs, evaluation=evaluation, devices=device.split(","), jobs=jobs, console=console)
    every = []
    report = out / ("report" if name == "all" else f"report-{name}")
    for which, own_of in chosen.items():
        of = {v: {seed: plan[which, v, seed][0] for seed in seeds} for v in own_of}
        rows = conclude(which, of, outcome, beginning, report=report, evaluation=evaluation, runs=runs)
        console.print(table(rows, width=console.width))
        every += rows
    page = report / f"{name}.md"
    if name == "all":
        page, lines = report / "report.md", "".join(f"- [{which}]({which}.md)\n" for which in chosen)
        index = f"# Ablations of {model}\n\nSeeds {', '.join(map(str, seeds))}.\n\n{lines}"
        write_atomically(page, lambda partial: partial.write_text(index, encoding="utf-8"))
    console.print(f"wrote {page} in {(time.time() - began) / 60:.0f} minutes", soft_wrap=True)
    if failed := {folder: why for folder, why in outcome.items() if isinstance(why, str)}:
        console.print(f"{len(failed)} of {len(runs)} runs failed")
        if len(failed) == len(runs):
            raise ValueError(f"no variant of {name} ran: {'; '.join(sorted({*failed.values()}))}")
    return every


def difference(own: dict, shared: dict) -> dict:
    """The options of a variant that are not those of a run without it: {} for a baseline that is the default."""
    default = DEFAULTS | shared
    return {name: value for name, value in own.items() if name not in default or value != default[name]}


def conclude(
    name: str,
    folders: Mapping[str, Mapping[int, Path]],
    outcome: Mapping[Path, list[dict] | str],
    beginning: list[dict],
    *,
    report: Path,
    evaluation: dict,
    runs: Mapping[Path, dict],
) -> list[dict]:
    """One ablation's rows; writes its files to `report`. `folders` by variant and seed."""
    measured: dict[str, dict[int, list[dict]]] = {variant: {} for variant in folders}
    failed, commands = {}, []
    for variant, by_seed in folders.items():
        for seed, folder in by_seed.items():
            found = outcome[folder]
            if isinstance(found, str):
                failed[f"{variant}, seed {seed}"] = found
            else:
                measured[variant][seed] = found
            commands += commands_of(folder, runs[folder], evaluation)
    names = {runs[folder]["model"]: "start" for by_seed in folders.values() for folder in by_seed.values()}
    rows = [over_runs(names.get(row["model"], row["model"]), [[row]])[0] for row in beginning]
    rows += [row for variant, by_seed in measured.items() for row in over_runs(variant, list(by_seed.values()))]
    baseline, *others = folders
    differences = [d for variant in others for d in compared(variant, baseline, measured)]
    words = [f"The last table has differences from {baseline}, paired by seed, ± half the 95 % interval. * is a "
             f'result: 0 is outside the interval, and no difference of "{AGAIN}" in this metric is as large.',
             caution([found for found in differences if found["variant"] != AGAIN])] if differences else []
    header, lines = differences_of(differences)
    curves = {variant: {seed: metrics_file(folders[variant][seed]) for seed in by_seed}
              for variant, by_seed in measured.items() if by_seed}
    commands = list(dict.fromkeys(commands))
    complaints = [f"Failed: {run}: {why}" for run, why in failed.items()]
    write_json(report / f"{name}.json", {"ablation": name, "failed": failed, "rows": rows, "differences": differences,
                                         "commands": commands})
    paragraphs = "".join(f"\n{line}\n" for line in (*words, *complaints))
    code = "".join(f"    {line}\n" for line in commands)
    apart = grid(header, lines, left=2) if lines else ""
    figure = f"![Means over seeds, and differences paired by seed, with 95 % intervals]({name}.png)\n\n" * bool(curves)
    measures = f"{markdown(rows, error='interval')}\n± is the 95 % interval over seeds."
    text = f"# {name}\n\n{figure}{measures}\n{paragraphs}\n{apart}\n{code}"
    write_atomically(report / f"{name}.md", lambda partial: partial.write_text(text, encoding="utf-8"))
    if curves:
        plot_curves(curves, report / name, metrics=CURVES, title=name)
    return [row | {"ablation": name} for row in rows]


def over_runs(variant: str, runs: list[list[dict]]) -> list[dict]:
    """The rows of several trainings of one variant as one list: means, spreads and intervals over the trainings."""
    rows = []
    for same in zip(*runs, strict=True):
        row, metrics = same[0] | {"model": variant}, metrics_of(list(same))
        within = [name for name in row if name.endswith("_within")]
        row |= over_seeds([{name: one.get(name) for name in (*metrics, *within)} for one in same])
        for metric in metrics:
            known = [one[metric] for one in same if one.get(metric) is not None]
            row[f"{metric}_interval"] = interval(known)[1] if known else None
        for name in ("seconds_per_image", "network_evaluations", *(["steps_mean"] if row["steps"] == "auto" else [])):
            row[name] = statistics.fmean(one[name] for one in same)
        rows.append(row | {"runs": len(same)})
    return rows


def cell(row: dict) -> tuple:
    """What two rows must share to be compared: prompts, and the cost of an image unless the models choose it."""
    return row["prompts"], row["steps"], None if row["steps"] == "auto" else row["network_evaluations"]


def compared(variant: str, baseline: str, measured: Mapping[str, Mapping[int, list[dict]]]) -> list[dict]:
    """Differences of a variant from the baseline, paired by seed, for each of COMPARED at every common setting."""
    found = []
    for key in dict.fromkeys(cell(row) for rows in measured[variant].values() for row in rows):
        for metric in COMPARED if key[1] == "auto" else COMPARED[:-1]:
            values, others = (
                {s: row[metric] for s, rows in measured[which].items() for row in rows
                 if cell(row) == key and row.get(metric) is not None}
                for which in (variant, baseline)
            )
            if values.keys() & others.keys():
                setting = dict(zip(("prompts", "steps", "network_evaluations"), key, strict=True))
                found.append({"variant": variant, **setting, "metric": metric, **paired(values, others)})
    return found


def floors(differences: Iterable[dict]) -> dict[str, float]:
    """The size of the A/A pair's largest difference in each metric."""
    floor: dict[str, float] = {}
    for found in differences:
        if found["variant"] == AGAIN:
            floor[found["metric"]] = max(floor.get(found["metric"], 0.0), abs(found["difference"]))
    return floor


def is_result(found: dict, floor: Mapping[str, float]) -> bool:
    """Whether a difference is outside its interval and larger than the A/A pair's of this metric (`floors`)."""
    return bool(found["outside"]) and abs(found["difference"]) > floor.get(found["metric"], 0.0)


def differences_of(differences: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """A header, and a line for each variant and setting: differences ± half their interval's width, * at results."""
    floor = floors(differences)
    metrics = [metric for metric in COMPARED if any(found["metric"] == metric for found in differences)]
    by_line: dict[tuple, dict[str, dict]] = {}
    for found in differences:
        steps, nfe = found["steps"], found["network_evaluations"]
        setting = f"{steps}, {nfe:g} NFE" if nfe not in (None, steps) else str(steps)
        by_line.setdefault((found["variant"], found["prompts"], setting), {})[found["metric"]] = found

    def number(found: dict | None) -> str:
        if found is None:
            return "–"
        width = "" if found["interval"] is None else f" ±{found['interval']:.3f}"
        return f"{found['difference']:+.3f}{width}{' *' if is_result(found, floor) else ''}"

    lines = [[*line, *(number(of.get(metric)) for metric in metrics)] for line, of in by_line.items()]
    return ["variant", "prompts", "steps", *(TITLES[metric] for metric in metrics)], lines


def assignments(texts: Sequence[str]) -> dict[str, Any]:
    """Reads "lora=16" as an option of `train`. ValueError for what is none of its options."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name, value = name.strip().replace("-", "_"), value.strip()
        if not equals or name not in DEFAULTS:
            raise ValueError(f"`set` takes OPTION=VALUE with an option of train, not {text!r}")
        try:
            found[name] = ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
        except (ValueError, SyntaxError):
            found[name] = value  # a word
    return found
