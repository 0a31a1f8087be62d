"""Reinforcement learning beside its alternatives: `python -m experiments.study`.

Every method starts from the same model, the base with its searched sampler, sees the same number of images of the same
prompts, and has its learning rate chosen from the same grid; every choice is made by the reward on training prompts,
never by the judge or on the prompts that are measured. All are measured by `evaluate`, with the same guidance and
remasking. What is finished is kept: run it again after an interruption. OUT/report/index.html has the results.
"""

import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console
from speedrl.stages import search_sampler
from typer import Option

from experiments.alternatives.distil import distil
from experiments.alternatives.finetune import finetune
from experiments.study.comparing import plot_pareto, welch
from speedrl.cli import in_one_line, loading
from speedrl.evaluation.figures import contact_sheet, save_image
from speedrl.evaluation.judging import load_judge
from speedrl.evaluation.measuring import METRICS, columns_of, evaluate, evaluations, markdown, prompt_sets
from speedrl.evaluation.pages import Section, write_page
from speedrl.generation import sample
from speedrl.learner import SamplerSettings, sampler_of, training_prompts
from speedrl.method.schedules import parse_steps
from speedrl.method.steps import step_choices
from speedrl.models.loading import load_generator, save_generator
from speedrl.rewards.loading import load_quality
from speedrl.studies.ablations import over_runs
from speedrl.studies.intervals import caution, half_width, say
from speedrl.studies.runs import command, trained_once
from speedrl.system.errors import one_line
from speedrl.system.files import write_atomically, write_json
from speedrl.system.platform import quiet_allocator

if TYPE_CHECKING:
    from PIL.Image import Image

OWN = "base, own settings"
Train = Callable[..., Path]


class Method(NamedTuple):
    """A line of the figure: what is measured, at which settings, and how it was made."""

    models: tuple[str, ...]  # one for each training seed
    settings: tuple[dict, ...]  # options of `evaluate`, each for one or more step counts
    made: tuple[str, ...] = ()  # the commands that trained it
    note: str = ""


class Trainer(NamedTuple):
    """A method that trains: its function takes out, lr, seed and iterations and gives the model's folder."""

    train: Train
    command: Callable[..., str]  # what does the same by hand, of the same options
    steps: int | None = None  # what it is sampled with, where it has no choice
    guided: bool = False  # whether it is sampled as the base is, or without guidance


def trainers(
    base: str, *, steps: str, prompts: str | None, images: int, quality: str, device: str, compile: bool
) -> dict[str, Trainer]:
    """The methods that train, by name: the same images an iteration, of the same prompts."""
    shared = {"model": base, "prompts": prompts}
    group_size = max(2, min(16, images // 2))
    own = {"steps": steps, "groups": images // group_size, "group_size": group_size, "quality": quality, "search": 0,
           "compile": compile}
    one = shared | {"images": images, "compile": compile, "device": device}
    few = one | {"steps": steps}

    def module(name: str, options: dict) -> str:
        return command(name, options).replace("speedrl ", "python -m experiments.alternatives.", 1)

    return {
        "reinforcement learning": Trainer(
            lambda out, **options: trained_once(out, shared | own | options, device=device),
            lambda out, **o: command("train", {"out": out / "run"} | shared | own | o | {"device": device}),
            guided=True,
        ),
        "fine-tuning": Trainer(
            # the images of a seed are the same for every learning rate
            lambda out, **options: finetune(out=out, data=out.parent.parent / "images", **few, **options),
            lambda out, **options: module("finetune", {"out": out} | few | options),
        ),
        "one-step distillation": Trainer(
            lambda out, **options: distil(out=out, **one, **options),
            lambda out, **options: module("distil", {"out": out} | one | options),
            steps=1,
        ),
    }


def at(costs: Sequence[int], *, guidance: float, remask: float) -> dict[str, tuple]:
    """Options of `evaluate` for images of so many network evaluations."""
    each = evaluations(1, guidance)
    steps = tuple(cost // each for cost in costs if cost % each == 0)
    return {"steps": steps, "guidance": (guidance,), "remask": (remask,)}


def search_base(
    base: str, out: Path, prompts: Sequence[str], how: SamplerSettings, *, most: int, quality: str, device: str,
    rounds: int,
) -> Path:
    """The base with its searched sampler, kept in OUT: what every method starts from."""
    if not (out / "transformer").exists():
        generator = load_generator(base, device=device)
        score, sampler = load_quality(quality, device=device), how._asdict()
        del sampler["reference_guidance"]
        table = search_sampler(generator, prompts, score, step_choices(1, most), rounds=rounds, **sampler)
        save_generator(generator._replace(sampler={"search": table}), out)
    return out


def evaluated(models: Sequence[str], *, precision: str = "fp32", **options) -> list[dict]:
    """`evaluate` with the options of `speedrl eval`."""
    return evaluate(models, loading=loading({"precision": precision}), **options)


def run_folder(folder: Path, *, lr: float, seed: int) -> Path:
    return folder / f"lr-{lr:g}" / f"seed-{seed}"


def trained(method: Trainer, folder: Path, *, lr: float, seed: int, iterations: int) -> Path:
    """The model of one training, kept in `run_folder`; ValueError where it was of other options."""
    out = run_folder(folder, lr=lr, seed=seed)
    options = {"lr": lr, "seed": seed, "iterations": iterations}
    made = method.command(Path("OUT"), **options)  # all that it depends on, wherever it lies
    if (out / "done.json").exists():
        kept = json.loads((out / "done.json").read_text(encoding="utf-8"))
        if kept.get("made") != made:
            raise ValueError(f"{out} holds a run of other options: give another folder, or the same options")
        return Path(kept["model"])
    model = method.train(out, **options)
    write_json(out / "done.json", {"made": made, "model": str(model)})
    return model


def chosen_lr(
    method: Trainer, folder: Path, lrs: Sequence[float], *, iterations: int, selection: dict, settings: dict
) -> tuple[float, dict[str, float]]:
    """The learning rate of the grid with the best reward on the selection prompts, and the rewards of all."""
    rewards = {}
    for lr in lrs:
        model = trained(method, folder, lr=lr, seed=0, iterations=iterations)
        (row,) = evaluated([str(model)], out=folder / "selection", **settings, **selection)
        rewards[lr] = row["reward"]
    return max(rewards, key=rewards.get), {f"{lr:g}": reward for lr, reward in rewards.items()}


def measured(name: str, method: Method, *, out: Path, measuring: dict, seeds: int) -> list[dict]:
    """The rows of a method, with METRIC_interval: over its trainings, or over sampling seeds where it has but one."""
    runs = []
    for model in method.models:
        every = (evaluated([model], out=out, seeds=seeds, **settings, **measuring) for settings in method.settings)
        runs.append(list(itertools.chain.from_iterable(every)))
    rows = over_runs(name, runs)
    if len(runs) == 1:
        for row, one in zip(rows, runs[0], strict=True):
            spreads = {key: value for key, value in one.items() if key.endswith("_spread")}
            intervals = {f"{key.removesuffix('spread')}interval": half_width(v, seeds) for key, v in spreads.items()}
            row |= spreads | intervals
    return rows


def commands_of(method: Method, *, out: Path, measuring: dict, seeds: int) -> list[str]:
    """What made a method's rows."""
    every = itertools.product(method.models, method.settings)
    options = {"out": out, "seeds": seeds} | measuring
    return [*method.made, *(command("eval", {"model": model} | options | settings) for model, settings in every)]


def against(name: str, rows: Mapping[str, list[dict]], *, seeds: int) -> list[str]:
    """How a method differs from every other at equal network evaluations, in words: Welch's intervals.

    Those of a method that trains are over its trainings, of another over sampling seeds.
    """

    def sample_of(row: dict, metric: str) -> tuple[float, float | None, int]:
        return row[metric], row[f"{metric}_spread"], row["runs"] if row["runs"] > 1 else seeds

    words, every = [], []
    for other, theirs in rows.items():
        said = []
        for row, one in itertools.product(rows[name], theirs if other != name else ()):
            if any(row[key] != one[key] for key in ("prompts", "network_evaluations")):
                continue
            for metric in ("judge_r1", "judge_margin", "reward", "diversity"):
                if row.get(metric) is not None and one.get(metric) is not None:
                    every.append(welch(*sample_of(row, metric), other=sample_of(one, metric)))
                    where = f"{row['prompts']} prompts, {row['network_evaluations']:g} NFE"
                    said.append(f"{where}: {say(METRICS[metric], every[-1])}")
        if said:
            words.append(f"{name}, against {other}. {'. '.join(line[0].upper() + line[1:] for line in said)}.")
    return [*words, caution(every, kind="Welch's t-intervals")] if every else []


def equal_evaluations(methods: Mapping[str, Method], budget: int, prompts: list[str], *, device: str) -> "Image":
    """A contact sheet: a row for each method, in the most network evaluations up to `budget`; OWN in its own."""
    rows, labels = [], []
    for name, method in methods.items():
        costs = [
            (evaluations(steps, settings["guidance"][0]), steps, settings)
            for settings in method.settings for steps in settings["steps"]
        ]
        fitting = [cost for cost in costs if cost[0] <= budget or name == OWN]
        if fitting:
            cost, steps, settings = max(fitting, key=lambda found: found[0])
            generator = load_generator(method.models[0], device=device)
            how = {"guidance": settings["guidance"][0], "remask": settings["remask"][0]}
            rows.append(sample(generator, prompts, steps=steps, **how).cpu())
            labels.append(f"{name}: {cost} network evaluation{'s' * (cost > 1)}")
    return contact_sheet(rows, labels=labels, titles=prompts, scale=max(1, 96 // rows[0].shape[-1]))


def main(
    *,
    base: Annotated[str, Option(help="The model that all start from.")] = "embedded",
    out: Annotated[Path, Option(help="Trainings, measurements and the report; what is finished is kept.")] = Path(
        "runs/study"
    ),
    seeds: Annotated[int, Option(help="Trainings of each method, and repetitions of each measurement.")] = 3,
    iterations: Annotated[int, Option(help="Iterations of each training.")] = 100,
    images: Annotated[int, Option(help="Images of an iteration.")] = 128,
    steps: Annotated[str, Option(help="Step counts that training draws from.")] = "1-16",
    lrs: Annotated[str, Option(help="Learning rates to choose from.")] = "1e-5,3e-5,1e-4,3e-4",
    budgets: Annotated[str, Option(help="Network evaluations of an image to measure at.")] = "1,2,4,8,16",
    budget: Annotated[int, Option(help="Network evaluations of the contact sheet and of the choice of rates.")] = 4,
    count: Annotated[int, Option(help="Images of each prompt and seed.")] = 4,
    prompts: Annotated[str | None, Option(help="Prompts to train on. [default: the embedded model's]")] = None,
    eval_prompts: Annotated[
        str | None, Option(help="Prompts to measure. [default: the embedded model's two sets]")
    ] = None,
    quality: Annotated[str, Option(help="The reward, one quality as of speedrl train.")] = "embedded",
    precision: Annotated[str, Option(help="Of what is measured, as of speedrl eval.")] = "fp32",
    quick: Annotated[bool, Option(help="Only show that everything runs.")] = False,
    device: Annotated[str, Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Compare reinforcement learning with what else makes few steps good."""
    quiet_allocator()
    began, console = time.time(), Console(markup=False, highlight=False)
    grid = [float(lr) for lr in lrs.split(",")]
    costs = sorted({int(cost) for cost in budgets.split(",")})
    if quick:
        seeds, iterations, images, grid, costs, count, budget = 2, 1, 8, grid[:2], [1, 4], 2, 4
    training = list(training_prompts(base, prompts))
    texts = {"selection": training[-4 if quick else -48 :]}
    for name, lines in prompt_sets(eval_prompts, None).items():
        texts[name] = lines[:4] if quick else lines
    for name, lines in texts.items():
        text = "\n".join(lines) + "\n"
        write_atomically(out / f"{name}.txt", lambda to, text=text: to.write_text(text, encoding="utf-8"))
    shared = {"quality": quality, "device": device, "images": 0, "figure": False, "precision": precision}
    # the embedded model's own two sets keep their names, which the judge knows
    own = {} if eval_prompts is None and not quick else {"prompts": str(out / f"{[*texts][1]}.txt")}
    measuring = shared | own | {"count": count, "compile": not quick}
    selection = shared | {"prompts": str(out / "selection.txt"), "count": 2, "seeds": 1}

    start, most = load_generator(base), parse_steps(steps)[1]
    how = sampler_of(start, dict.fromkeys(SamplerSettings._fields), most=most)
    plain = at(costs, guidance=how.guidance, remask=how.remask)
    own_cost = evaluations(start.steps, start.guidance)
    own_settings = at([own_cost], guidance=start.guidance, remask=start.remask)
    searched = str(search_base(base, out / "base-searched", training, how, most=most, quality=quality, device=device,
                               rounds=1 if quick else 16))
    methods = {
        OWN: Method((base,), (own_settings,), note=f"{start.steps} steps, as it comes"),
        "base": Method((base,), (plain,)),
        "base, searched sampler": Method((searched,), (plain,), note="what every training starts from"),
    }
    failed, picked = {}, {}
    makers = trainers(searched, steps=steps, prompts=prompts, images=images, quality=quality, device=device,
                      compile=not quick)
    for name, method in makers.items():
        folder = out / name.replace(" ", "-")
        console.rule(name)
        guidance = how.guidance if method.guided else 1.0
        try:
            one = at([method.steps or budget], guidance=guidance, remask=how.remask)
            lr, rewards = chosen_lr(method, folder, grid, iterations=iterations, selection=selection, settings=one)
            console.print(f"learning rate {lr:g} of {rewards}")
            models = [trained(method, folder, lr=lr, seed=seed, iterations=iterations) for seed in range(seeds)]
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped in {folder}; the same command goes on") from None
        except Exception as error:  # one method that fails is no reason to lose the others
            failed[name] = one_line(error)
            console.print(f"{name} failed: {failed[name]}")
            continue
        picked[name] = {"lr": lr, "rewards": rewards}
        made = [
            method.command(run_folder(folder, lr=lr, seed=seed), lr=lr, seed=seed, iterations=iterations)
            for seed in range(seeds)
        ]
        settings = at([method.steps] if method.steps else costs, guidance=guidance, remask=how.remask)
        methods[name] = Method(tuple(map(str, models)), (settings,), tuple(made), f"learning rate {lr:g}")

    console.rule("measuring")
    rows = {
        name: measured(name, method, out=out / "eval", measuring=measuring, seeds=seeds)
        for name, method in methods.items()
    }
    conclude(
        rows,
        methods,
        out=out,
        failed=failed,
        picked=picked,
        measuring=measuring,
        seeds=seeds,
        minutes=(time.time() - began) / 60,
        settings={"iterations": iterations, "images": images, "steps": steps},
    )
    shown = next(lines for name, lines in texts.items() if name != "selection")[:10]
    sheet = equal_evaluations(methods, budget, shown, device=device)
    save_image(sheet, out / "report" / "equal_evaluations.png")
    console.print(f"wrote {out / 'report' / 'index.html'}", soft_wrap=True)


def conclude(
    rows: dict[str, list[dict]],
    methods: dict[str, Method],
    *,
    out: Path,
    failed: dict[str, str],
    picked: dict,
    measuring: dict,
    seeds: int,
    minutes: float,
    settings: dict,
) -> None:
    """Writes OUT/report: index.html, study.json, study.md and a Pareto figure for each set of prompts."""
    report, every = out / "report", [row for of in rows.values() for row in of]
    try:
        real = load_judge().real
    except FileNotFoundError:
        real = {}
    figures = []
    for which in dict.fromkeys(row["prompts"] for row in every):
        of = {name: [row for row in found if row["prompts"] == which] for name, found in rows.items()}
        name = f"pareto-{which.replace(' ', '-')}"
        quality = "judge_r1" if any(row.get("judge_r1") is not None for row in every) else "reward"
        plot_pareto(of, report / name, quality=quality, real=real.get(which))
        figures.append((f"{name}.png", f"{which} prompts: quality and diversity against NFE and seconds"))
    budgets = {
        name: json.loads((Path(method.models[0]).parent / "budget.json").read_text(encoding="utf-8"))
        for name, method in methods.items()
        if (Path(method.models[0]).parent / "budget.json").exists()
    }
    about = [
        f"Trained: {settings['iterations']} iterations of {settings['images']} images, {settings['steps']} steps, "
        f"{seeds} seeds, the learning rate of each method chosen on training prompts.",
        *(
            f"{name}: {found['network_evaluations']} network evaluations for its training data and losses."
            for name, found in budgets.items()
        ),
        *(f"{name}: {method.note}." for name, method in methods.items() if method.note),
        "± is half the width of the 95 % interval of the mean: over trainings where a method trains, else over "
        f"sampling seeds. The last call took {minutes:.0f} minutes.",
        *(f"Failed: {name}: {why}" for name, why in failed.items()),
    ]
    words = against("reinforcement learning", rows, seeds=seeds) if "reinforcement learning" in rows else []
    commands = {name: commands_of(m, out=out / "eval", measuring=measuring, seeds=seeds) for name, m in methods.items()}
    again = shlex.join(["python", "-m", "experiments.study", *sys.argv[1:]])
    write_json(report / "study.json", {"command": again, "rows": every, "failed": failed, "picked": picked,
                                       "words": words, "budgets": budgets, "commands": commands})
    text = "# Reinforcement learning and its alternatives\n\n" + "\n\n".join((*about, *words))
    text += f"\n\n{markdown(every, error='interval')}\n    {again}\n"
    write_atomically(report / "study.md", lambda partial: partial.write_text(text, encoding="utf-8"))
    sections = [
        Section("Results", about, figures, [columns_of(every, error="interval")], files=["study.json", "study.md"]),
        Section("In words", words),
        Section("At equal cost", images=[("equal_evaluations.png", "one row a method, same prompts and seeds")]),
        *(Section(name, commands=lines) for name, lines in commands.items()),
        Section("All of it", commands=[again]),
    ]
    write_page(report / "index.html", "Reinforcement learning and its alternatives", sections)


if __name__ == "__main__":
    typer.run(in_one_line(main))
