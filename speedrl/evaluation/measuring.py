"""Evaluation: how good, how true to the prompt, how diverse and how fast, over a list of step counts."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from speedrl.evaluation.attributes import SIDE, attribute_shares
from speedrl.evaluation.figures import contact_sheet, save_image
from speedrl.evaluation.judging import (
    Judge,
    concepts_in,
    diversity,
    features,
    frechet,
    load_judge,
    margins,
    pixel_diversity,
    recall,
)
from speedrl.generation import draw, sample
from speedrl.method.sampler import Sampler
from speedrl.models.generator import Generator, decode, fitting_batch
from speedrl.models.loading import load_generator
from speedrl.models.sources import parts_of
from speedrl.rewards.loading import Score, load_qualities
from speedrl.run.prompts import read_prompts
from speedrl.run.shared_options import (
    PROMPTS,
    QUALITY,
    REWARD_WEIGHTS,
    Base,
    Device,
    MicroConds,
    NegativePrompt,
    Precision,
    Size,
    TextEncoder,
)
from speedrl.system.files import write_atomically, write_json
from speedrl.system.options import SAMPLER as SAMPLING
from speedrl.system.options import Opt, check_options, listed
from speedrl.system.platform import DTYPES, check_device, pick_device

METRICS = {
    "reward": "reward", "judge_r1": "R@1", "judge_margin": "margin", "diversity": "diversity", "judge_r5": "R@5",
    "frechet": "Fréchet", "pixel_diversity": "pixel diversity", "ground": "ground", "size": "size", "place": "place",
}
UNPLOTTED = ("judge_r5", "size", "place")
# what rows of one model and count differ in; rows that were measured before there was shared noise lack it
SAMPLER = ("guidance", "temperature", "schedule", "order", "remask", "shared_noise")
# columns of a table that give way first where it is too wide
LESS_IMPORTANT = ("pixel diversity", "place", "size", "order", "schedule", "temperature", "Fréchet", "R@5", "s/image",
                  "remask", "ground", "diversity", "guidance", "margin", "prompts")
SEPARATED = 0.5  # d' below which a reward hardly tells few steps from many


def evaluate(
    models: Annotated[str | Path | Generator | Sequence[str | Path | Generator], Opt(
        "embedded, a folder, a run or a hub id; give it again for more.", flags=("--model",),
        cli=list[str])] = ("embedded",),
    *,
    out: Annotated[str | Path, Opt("Folder of the results, which replace earlier ones.", cli=Path)] = "runs/eval",
    steps: Annotated[str | Sequence[int | str], Opt(
        "Step counts, and auto for the choice of a model's step policy.", cli=str)] = (1, 2, 4, 8, 16, 32),
    guidance: Annotated[str | Sequence[float] | None, Opt("Guidance scales, like 1,3. [default: the model's, and 1]",
                                                          SAMPLING, cli=str | None)] = None,
    temperature: Annotated[str | Sequence[float] | None, Opt(
        "Temperatures of the reveal order. [default: the model's]", SAMPLING, cli=str | None)] = None,
    schedule: Annotated[str | Sequence[str] | None, Opt("Mask schedules, like cosine,arccos. [default: the model's]",
                                                        SAMPLING, cli=str | None)] = None,
    order: Annotated[str | Sequence[str] | None, Opt("Reveal orders, like confidence,halton. [default: the model's]",
                                                     SAMPLING, cli=str | None)] = None,
    remask: Annotated[str | Sequence[float] | None, Opt(
        "Shares of tokens to remask, like 0,0.5. [default: the model's]", SAMPLING, cli=str | None)] = None,
    shared_noise: Annotated[str | Sequence[bool] | None, Opt(
        "Whether positions share the noise of their tokens: 0, 1 or 0,1. [default: the model's]", SAMPLING,
        cli=str | None)] = None,
    prompts: Annotated[str | Path | Sequence[str] | None, Opt(PROMPTS, cli=str | None)] = None,
    held_out: Annotated[str | Path | Sequence[str] | None, Opt("Another, of prompts that no training saw.",
                                                               cli=str | None)] = None,
    count: Annotated[int, Opt("Images of each prompt and seed.", least=1)] = 4,
    seeds: Annotated[int, Opt("Repetitions, for the spread.", least=1)] = 3,
    quality: Annotated[Any, Opt(f"{QUALITY}, to measure no reward.", cli=str)] = "embedded",
    reward_weights: Annotated[Sequence[str], Opt(REWARD_WEIGHTS, cli=list[str])] = (),
    images: Annotated[int, Opt("Columns of the contact sheet, 0 for none.", least=0)] = 10,
    figure: Annotated[bool, Opt("Plot quality against network evaluations.")] = True,
    batch: Annotated[int | None, Opt("Images drawn at a time. [default: by their size]", least=1)] = None,
    compile: Annotated[bool, Opt("Use torch.compile.")] = False,
    text_encoder: TextEncoder = None,
    size: Size = None,
    negative_prompt: NegativePrompt = None,
    micro_conds: MicroConds = None,
    base: Base = None,
    precision: Precision = "fp32",
    device: Device = "auto",
) -> list[dict]:
    """Evaluates every model at every step count and setting of the sampler, on each set of prompts: one row each.

    `models` are names, as of `load_generator`, or generators, which are called "generator 1", "generator 2" and so on,
    stay on their device and are not compiled. `steps` are numbers, or "auto": for each prompt what the model's step
    policy finds most likely. guidance None is the model's own and 1 (none); temperature, mask schedule, reveal order
    and the share of tokens to remask None are its own. Prompts are files or lists: without any there are two sets,
    "training", new prompts of the concepts that the embedded model's training prompts name, and "held-out", of concepts
    that none of them names; `prompts` alone is evaluated alone, as "given", and `held_out` beside it as "given
    held-out". `count` images of each prompt for each of `seeds` seeds; image i of a seed starts from the same noise
    whatever the model and the settings. `quality` None leaves the reward out. `images` is the number of columns of the
    contact sheet, 0 for none, `figure` whether quality is plotted against network evaluations. `compile` pays where
    there are many images.

    A row: model, prompts (the set), steps, guidance, temperature, schedule, order, remask, network_evaluations (of an
    image: one a step, two with guidance), seconds_per_image (median over seeds; text encoder and decoder included, in
    batches of `batch`, by default `fitting_batch`), each of METRICS with METRIC_spread, the standard deviation over
    seeds (n - 1), and of each quality NAME_within, that of images of one prompt; None where it has no meaning. Where
    steps are "auto" there are steps_mean and steps_mode over the images, and network_evaluations is a mean.
    Writes out/results.json after each row, in place of what was there, quality_against_nfe.png and images.png, and
    prints a table and how well the qualities tell step counts apart (`separations`). ValueError or FileNotFoundError
    for bad input, before anything is computed.
    """
    check_options(evaluate, locals())
    out, named, device = Path(out), by_name(models), pick_device(device)
    counts = listed(steps, lambda s: s if s == "auto" else int(s), name="steps") or ()
    if any(s != "auto" and s < 1 for s in counts):
        raise ValueError(f"`steps` must be numbers from 1 on, or auto, got {steps!r}")
    kinds: dict[str, Callable] = {"guidance": float, "temperature": float, "schedule": str, "order": str,
                                  "remask": float, "shared_noise": lambda text: bool(int(text))}
    asked = zip(kinds, (guidance, temperature, schedule, order, remask, shared_noise), strict=True)
    varied = {name: listed(value, kinds[name], name=name) for name, value in asked}
    for name, values in varied.items():
        for value in values or ():
            Sampler(**{name: value})  # what is out of range is told before anything is loaded
    sets = prompt_sets(prompts, held_out)
    has_policy = {name: has_step_policy(model, base) for name, model in named.items()}  # a missing model is told here
    if "auto" in counts and not all(has_policy.values()):
        fixed = next(name for name in named if not has_policy[name])
        raise ValueError(f"`steps` auto is for models that were trained with a range of steps, and {fixed} was not: "
                         "give numbers")
    check_device(device)
    console = Console(markup=False, highlight=False)
    judge = judge_if_there(device, console)
    scores = {}
    if quality is not None:
        tried = next(iter(sets.values()))
        scores = load_qualities(quality, device=device, weights=reward_weights, prompts=tried)[0]

    rows: list[dict] = []
    sheet, labels = [], []
    shown = next(iter(sets.values()))[:images]
    bar = (BarColumn(), TaskProgressColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}", markup=False), *bar, console=console, transient=True) as progress:
        task, done = progress.add_task("loading", total=None), 0
        for number, (model, given) in enumerate(named.items()):
            generator = given if isinstance(given, Generator) else load_generator(
                given, device=device, dtype=DTYPES[precision], text_encoder=text_encoder, size=size,
                negative=negative_prompt, micro_conds=micro_conds, base=base)
            own: dict[str, tuple] = {name: (value,) for name, value in generator.sampler.settings().items()}
            own["guidance"] = (generator.sampler.guidance, 1.0)
            samplers = [
                dict(zip(SAMPLER, chosen, strict=True))
                for chosen in itertools.product(*(dict.fromkeys(varied[name] or own[name]) for name in SAMPLER))
            ]
            alike = [how for how in samplers if how["guidance"] == samplers[0]["guidance"]
                     and how["temperature"] == samplers[0]["temperature"]]
            for how, s in itertools.product(alike, dict.fromkeys(counts)) if shown else ():
                progress.update(task, description=f"{shorten(model)}: images")
                sheet.append(sample(generator, shown, steps=s, sampler=generator.sampler.replace(**how)).cpu())
                labels.append(f"{shorten(model)}, {s} step{'s' * (s != 1)}")
                labels[-1] += f", {sampler_words(how)}" if len(alike) > 1 else ""
            if compile and generator is not given:  # after the contact sheet, whose few images would not pay for it
                torch.compiler.reset()  # after the networks of a few models the compiler would give up
                generator.transformer.compile_blocks()
            todo = list(itertools.product(sets, samplers, dict.fromkeys(counts)))
            effort = [len(sets[which]) * (evaluations(8 if s == "auto" else s, how["guidance"]) + 2)
                      for which, how, s in todo]
            # the models to come are taken to cost as much as this one
            progress.update(task, total=done + sum(effort) * (len(named) - number), completed=done)
            for (which, how, s), cost in zip(todo, effort, strict=True):
                label = f"{shorten(model)}: {s} steps, guidance {how['guidance']:g}, {which}"
                progress.update(task, description=label)
                row = {"model": model, "prompts": which, "steps": s} | how
                rows.append(row | one_cell(
                    generator, judge, scores, sets[which], which=which, steps=s, count=count, seeds=seeds, batch=batch,
                    after_seed=partial(progress.advance, task, cost / seeds), sampler=generator.sampler.replace(**how),
                ))
                done += cost
                write_json(out / "results.json", rows)
    written = ["results.json"]
    if figure and plot(rows, out / "quality_against_nfe.png", real=judge.real if judge else None):
        written.append("quality_against_nfe.png")
    if sheet:
        scale = max(1, 128 // sheet[0].shape[-1])
        save_image(contact_sheet(sheet, labels=labels, titles=shown, scale=scale), out / "images.png")
        written.append("images.png")
    console.print(table(rows, width=console.width))
    for line in separations(rows, qualities=["reward"] if len(scores) == 1 else [*scores]):
        console.print(line, soft_wrap=True)
    console.print(f"wrote {', '.join(written)} in {out}", soft_wrap=True)
    return rows


def by_name(
    models: str | Path | Generator | Sequence[str | Path | Generator],
) -> dict[str, str | Generator]:
    """One or more models by what they are called, as `evaluate` says. ValueError for none."""
    # a Generator is a tuple too
    every: list = [models] if isinstance(models, str | Path | Generator) else list(models)
    if not every:
        raise ValueError("there is no model to evaluate: give at least one by `models`")
    generators = itertools.count(1)
    return {
        f"generator {next(generators)}" if isinstance(model, Generator) else str(model):
        model if isinstance(model, Generator) else str(model)
        for model in every
    }


def has_step_policy(model: str | Path | Generator, base: str | Path | None = None) -> bool:
    """Whether a model was trained with a range of steps; of one on disk no weights are read. `base` is an adapter's.

    FileNotFoundError or ValueError where there is no model.
    """
    from safetensors import safe_open

    if isinstance(model, Generator):
        return bool(model.step_policy)
    for path in (folder / "sampler.safetensors" for folder in parts_of(model, base)):
        if path.exists():
            with safe_open(path, "pt") as file:
                return "steps.bias" in file.keys()  # noqa: SIM118
    return False


def one_cell(
    generator: Generator,
    judge: Judge | None,
    scores: dict[str, Score],
    prompts: list[str],
    *,
    which: str,
    steps: int | str,
    count: int,
    seeds: int,
    batch: int | None = None,
    warm: bool = True,
    after_seed: Callable[[], object] = lambda: None,
    sampler: Sampler | None = None,
) -> dict[str, float | None]:
    """network_evaluations, seconds_per_image, METRICS and their spread, of `count` images of each prompt for each seed
    0 .. seeds - 1; with steps "auto" also steps_mean and steps_mode. `sampler` None is the generator's own."""
    wanted = [prompt for prompt in prompts for _ in range(count)]
    if warm:  # compilation and first calls stay out of the clock
        sample(generator, wanted[: fitting_batch(generator) if batch is None else batch], steps=1, sampler=sampler)
    values, seconds = [], []
    for seed in range(seeds):
        began = time.perf_counter()
        tokens, taken = draw(generator, wanted, steps=steps, seed=seed, batch=batch, sampler=sampler)
        images = decode(generator, tokens).cpu()
        seconds.append((time.perf_counter() - began) / len(wanted))
        values.append(measure(judge, scores, images.unflatten(0, (-1, count)), prompts, which=which))
        after_seed()
    each = (sampler or generator.sampler).evaluations(1)
    row: dict[str, Any] = {"network_evaluations": each * taken[0].item()}
    if steps == "auto":  # the same counts with every seed
        mean = taken.double().mean().item()
        row = {"network_evaluations": each * mean, "steps_mean": mean, "steps_mode": taken.mode().values.item()}
    return row | {"seconds_per_image": statistics.median(seconds)} | over_seeds(values)


def measure(
    judge: Judge | None,
    scores: dict[str, Score],
    images: Tensor,
    prompts: list[str],
    *,
    which: str = "training",
) -> dict[str, float | None]:
    """METRICS of images [P, n, 3, H, W] in [0, 1], n of each of P prompts; None where one has no meaning.

    reward: the mean quality; where there are several each has its name instead. judge_r1, judge_r5: the share of images
    whose nearest concept, or one of the nearest five, is of their prompt; judge_margin: the mean of `margins`; all
    three over the prompts that name a concept. frechet: to the real images of the set of prompts `which`, for the two
    of the embedded model alone. diversity and pixel_diversity: within a prompt, for n of 2 or more. ground, size,
    place: `attribute_shares` of images of 64 pixels whose prompts name a concept. Beside METRICS there is NAME_within
    of each quality, for n of 2 or more: its standard deviation (n - 1) within a prompt, pooled over prompts. ValueError
    where P differs.
    """
    if len(images) != len(prompts):
        raise ValueError(f"images of {len(images)} prompts for {len(prompts)} prompts")
    n, found = images.shape[1], dict.fromkeys(METRICS)
    flat, repeated = images.flatten(0, 1), [prompt for prompt in prompts for _ in range(n)]
    for name, score in scores.items():
        name, values = name if len(scores) > 1 else "reward", score(flat, repeated).float()
        found[name] = float(values.mean())
        if n > 1:
            found[f"{name}_within"] = float(values.unflatten(0, (-1, n)).var(1).mean().sqrt())
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
        judged = values[named], [concepts[i] for i in named]
        first, five = recall(judge, *judged)
        found["judge_r1"], found["judge_r5"] = float(first.float().mean()), float(five.float().mean())
        found["judge_margin"] = float(margins(judge, *judged).mean())
        if flat.shape[-2:] == (SIDE, SIDE):
            found |= attribute_shares(flat[named], [repeated[i] for i in named])
    if which in judge.real_mean and len(values) > 1:
        found["frechet"] = frechet(judge, values, prompts=which)
    return found


def over_seeds(values: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Mean of each metric over seeds, and METRIC_spread, its standard deviation (n - 1; None for one seed), which
    those of NAME_within do not have."""
    row = {}
    for metric in dict.fromkeys(name for value in values for name in value):
        known = [found for value in values if (found := value.get(metric)) is not None]
        row[metric] = statistics.fmean(known) if known else None
        if not metric.endswith("_within"):
            row[f"{metric}_spread"] = statistics.stdev(known) if len(known) > 1 else None
    return row


def separation(few: Mapping[str, Any], many: Mapping[str, Any], *, quality: str = "reward") -> float | None:
    """d' of a quality between two rows: the difference of means over the standard deviation within a prompt, pooled.

    0.5 is what half a standard deviation sets apart. None where a row has no such deviation, as of one image a prompt.
    """
    within = few.get(f"{quality}_within"), many.get(f"{quality}_within")
    if within[0] is None or within[1] is None or not any(within):
        return None
    return (many[quality] - few[quality]) / ((within[0] ** 2 + within[1] ** 2) / 2) ** 0.5


def separations(rows: Iterable[dict], *, qualities: Sequence[str] = ("reward",)) -> list[str]:
    """Lines that say how far each quality tells adjacent step counts apart, by model, prompts and sampler.

    With a warning where it does not tell the fewest from the most by SEPARATED: training has nothing to gain there.
    """
    lines: list[str] = []
    curves: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["steps"] != "auto":
            curves.setdefault(tuple(row.get(name, False) for name in ("model", "prompts", *SAMPLER)), []).append(row)
    for quality, own in itertools.product(qualities, curves.values()):
        own = sorted(own, key=lambda row: row["steps"])
        pairs = [*itertools.pairwise(own), *([(own[0], own[-1])] if len(own) > 2 else [])]
        found = [value for pair in pairs if (value := separation(*pair, quality=quality)) is not None]
        if not found or len(found) < len(pairs):
            continue
        first = own[0]
        told = ", ".join(f"{few['steps']} to {many['steps']} steps {value:.2f}"
                         for (few, many), value in zip(pairs, found, strict=True))
        lines.append(f"d' of {quality}, {shorten(first['model'])}, {first['prompts']} prompts, guidance "
                     f"{first['guidance']:g}: {told}")
        if found[-1] < SEPARATED:
            few, many = pairs[-1]
            lines.append(f"warning: {quality} hardly tells {few['steps']} from {many['steps']} steps (d' "
                         f"{found[-1]:.2f}, below {SEPARATED}): training by it may not see what few steps lose")
    return lines


def evaluations(steps: int, guidance: float) -> int:
    """Network evaluations of an image (NFE): one a step, two with guidance."""
    return steps * (1 if guidance == 1 else 2)


def prompt_sets(
    prompts: str | Path | Sequence[str] | None, held_out: str | Path | Sequence[str] | None
) -> dict[str, list[str]]:
    """The prompts of each set, as `evaluate` says. ValueError for an empty list."""
    own = Path(__file__).parents[1] / "models" / "embedded" / "prompts"
    sets = {"training": read_prompts(own / "eval.txt")} if prompts is None else {"given": read_prompts(prompts)}
    if held_out is not None:
        sets["given held-out"] = read_prompts(held_out)
    elif prompts is None:
        sets["held-out"] = read_prompts(own / "held_out.txt")
    return sets


def judge_if_there(device: str, console: Console) -> Judge | None:
    try:
        return load_judge(device=device)
    except FileNotFoundError as error:
        console.print(f"no judge, so no recall, Fréchet distance or diversity: {error}", soft_wrap=True)
        return None


def sampler_words(how: Mapping[str, Any]) -> str:
    """What a label says of a sampler's settings."""
    words = f"{how['schedule']}, {how['order']}" + f", remasks {how['remask']:g}" * bool(how["remask"])
    return words + ", shared noise" * how.get("shared_noise", False)


def shorten(model: str, *, width: int = 28) -> str:
    """A model's name for tables: its end, where it is long, without the folder that every run has."""
    model = model.removesuffix("/model")
    return model if len(model) <= width else "…" + model[1 - width :]


def metrics_of(rows: list[dict]) -> dict[str, str]:
    """Titles of the metrics that any row has: qualities with a name of their own, then METRICS."""
    own = [name.removesuffix("_spread") for row in rows for name in row if name.endswith("_spread")]
    titles = {name: name for name in own if name not in METRICS} | METRICS
    return {name: title for name, title in titles.items() if any(row.get(name) is not None for row in rows)}


def nfe_of(row: dict) -> str:
    """A row's network evaluations as text, with one decimal where they are a mean."""
    value = row["network_evaluations"]
    return f"{value:.1f}" if value % 1 else f"{value:.0f}"


def steps_of(row: dict) -> str:
    """A row's steps as text; chosen ones as their mode and mean, like "auto: 8 (7.3)"."""
    return f"auto: {row['steps_mode']} ({row['steps_mean']:.1f})" if row["steps"] == "auto" else str(row["steps"])


def columns_of(rows: list[dict], *, spreads: bool = True, error: str = "spread") -> tuple[list[str], list[list[str]]]:
    """A header and a line of text for each row, ± METRIC_`error`; metrics that no row has are left out, and schedules
    and orders that are alike in all."""
    shown = metrics_of(rows)

    def number(row: dict, name: str) -> str:
        value, spread = row.get(name), row.get(f"{name}_{error}")
        digits = 1 if name == "frechet" else 3
        text = "–" if value is None else f"{value:.{digits}f}"
        return text if spread is None or not spreads else f"{text} ±{spread:.{digits}f}"

    told = [name for name in SAMPLER if name in ("guidance", "temperature", "remask")
            or len({row.get(name, False) for row in rows}) > 1]
    header = ["model", "prompts", "steps", "NFE", *told, *shown.values(), "s/image"]
    lines = [
        [shorten(row["model"]), row["prompts"], steps_of(row), nfe_of(row),
         *(row[name] if isinstance(row.get(name), str) else f"{row.get(name, False):g}" for name in told),
         *(number(row, name) for name in shown), f"{row['seconds_per_image']:.3f}"]
        for row in rows
    ]
    return header, lines


def table(rows: list[dict], *, width: int = 160) -> Table:
    """Rows for a terminal of `width` columns: where they do not fit the spreads go, then LESS_IMPORTANT columns."""

    def needed(columns: dict[str, list[str]]) -> int:
        return sum(max(map(len, (title, *cells))) + 2 for title, cells in columns.items())

    for spreads in (True, False):
        header, lines = columns_of(rows, spreads=spreads)
        columns = {title: list(cells) for title, *cells in zip(header, *lines, strict=True)}
        if needed(columns) <= width:
            break
    for title in LESS_IMPORTANT:
        if needed(columns) > width:
            columns.pop(title, None)
    shown = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for title in columns:
        text = title in ("model", "prompts")
        shown.add_column(title, justify="left" if text else "right", no_wrap=title != "model", overflow="fold")
    for cells in zip(*columns.values(), strict=True):
        shown.add_row(*cells)
    return shown


def markdown(rows: list[dict], *, error: str = "spread") -> str:
    """Rows as a table in Markdown."""
    return grid(*columns_of(rows, error=error), left=2)


def grid(header: Sequence[str], lines: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A table in Markdown, its first `left` columns aligned to the left."""
    rule = ["---" if i < left else "--:" for i in range(len(header))]
    first, *rest = (f"| {' | '.join(line)} |" for line in (header, *lines))
    return "\n".join([first, f"|{'|'.join(rule)}|", *rest, ""])


def plot(rows: list[dict], path: Path, *, real: dict | None = None) -> bool:
    """Quality against network evaluations into a PNG, if any row has a metric; returns whether.

    A row of panels for each set of prompts, a column for each metric. A curve for each model and setting of the sampler
    has a marker and a dash of its own beside its colour; bars are the spread over seeds. `real` is judge.real: a broad
    grey line where real images are.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no window

    sets = list(dict.fromkeys(row["prompts"] for row in rows))
    titles = metrics_of(rows)
    metrics = [metric for metric in titles if metric not in UNPLOTTED]
    if not metrics:
        return False
    varied = [name for name in SAMPLER if len({row.get(name, False) for row in rows}) > 1]

    def curve(row: dict) -> tuple:
        return row["model"], row["steps"] == "auto", *(row.get(name, False) for name in varied)

    curves = list(dict.fromkeys(map(curve, rows)))
    figure = Figure(figsize=(3.4 * len(metrics), 2.9 * len(sets) + 0.3 * len(curves)), layout="constrained", dpi=130)
    axes = figure.subplots(len(sets), len(metrics), squeeze=False)
    for (i, which), (j, metric) in itertools.product(enumerate(sets), enumerate(metrics)):
        panel = axes[i][j]
        for k, key in enumerate(curves):
            points = sorted(
                (row["network_evaluations"], row[metric], row.get(f"{metric}_spread") or 0)
                for row in rows
                if curve(row) == key and row["prompts"] == which and row.get(metric) is not None
            )
            if points:
                model, auto, *settings = key
                words = [f"{name} {value}" for name, value in zip(varied, settings, strict=True)]
                costs, values, spreads = zip(*points, strict=True)
                panel.errorbar(
                    costs, values, yerr=spreads, label=", ".join([shorten(model), *["auto"] * auto, *words]),
                    marker="osD^vPX*<>"[k % 10], linestyle=("-", "--", "-.", (0, (1, 1)))[k % 4], color=f"C{k % 10}",
                    markersize=5, linewidth=1.4, capsize=2,
                )
        if real and real.get(which, {}).get(metric) is not None:
            panel.axhline(real[which][metric], color="0.75", linewidth=4, zorder=0, label="real images")
        label_evaluations(panel, rows, name=i == len(sets) - 1)
        panel.grid(alpha=0.3)
        panel.set_title(f"{titles[metric]}, {which} prompts", fontsize=10)
    legend(figure, axes, columns=2)
    write_atomically(path, lambda partial: figure.savefig(partial, format="png"))
    return True


def label_evaluations(panel: Any, rows: Iterable[dict], *, name: bool = True) -> None:
    """A logarithmic axis of network evaluations with a tick for each that rows have; means have none."""
    whole = sorted({row["network_evaluations"] for row in rows if row["steps"] != "auto"})
    panel.set_xscale("log", base=2)
    if whole:
        panel.set_xticks(whole, [f"{value:g}" for value in whole])
    panel.set_xlabel("network evaluations an image" if name else "")


def legend(figure: Any, axes: Any, *, columns: int) -> None:
    """One legend below all panels."""
    pairs = [pair for panel in axes.flat for pair in zip(*panel.get_legend_handles_labels(), strict=True)]
    known = {label: handle for handle, label in pairs}
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
