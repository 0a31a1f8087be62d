"""The command line. Each command forwards to one function, whose keyword defaults are the options' defaults."""

import ast
import contextlib
import enum
import functools
import gc
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

QUALITY = (
    "Names and weights, like hpsv2=1,clip=0.5: embedded, hpsv2, imagereward, clip, a folder, MODULE:FUNCTION, "
    "FILE.py:FUNCTION; or none"
)
PROMPTS = (
    "A file: text with one prompt a line, JSON, JSONL, CSV or TSV; or a set by name: hpsv2, hpsv2-photo, -anime, "
    "-concept-art or -paintings, partiprompts, geneval. [default: the embedded model's]"
)
REWARD_WEIGHTS = "NAME=FILE: weights of a quality in place of the published ones."

RL, SAMPLER, REWARD = "Reinforcement learning", "Sampler", "Reward"
MEMORY, RANKS, OUTPUT, MODEL = "Memory and speed", "Several processes", "Output", "Model"

Likelihood = enum.StrEnum("Likelihood", ["exact", "token", "sequence"])
Divergence = enum.StrEnum("Divergence", ["ce", "reverse", "k1", "k2", "k3", "none"])
RevealOrder = enum.StrEnum("RevealOrder", ["confidence", "random", "halton"])
Scale = enum.StrEnum("Scale", ["group", "batch", "none"])
Parallel = enum.StrEnum("Parallel", ["ddp", "fsdp"])
Precision = enum.StrEnum("Precision", ["fp32", "bf16", "fp16"])


def under(panel: str, help: str, *flags: str) -> Any:
    """An option that its command's help lists in a panel."""
    return Option(*flags, help=help, rich_help_panel=panel)


Device = Annotated[str, Option(help="auto, cpu, cuda, mps; auto takes the first of cuda, mps and cpu that works.")]
TextEncoder = Annotated[str | None, under(MODEL, "A CLIP's folder or hub id. [default: the model's own]")]
Size = Annotated[str | None, under(MODEL, "Height and width in pixels, like 512x768. [default: the model's]")]
Base = Annotated[str | None, under(MODEL, "The base of an adapter, if it is no longer where it was.")]
Negative = Annotated[str | None, under(MODEL, "What guidance leads away from. [default: the model's]")]
Precisions = Annotated[Precision, under(MODEL, "Of transformer and text encoder.")]
MicroConds = Annotated[
    str | None, under(MODEL, "Width, height, crop top, crop left, aesthetic score. [default: the size,0,0,6]")
]
Schedule = Annotated[
    str | None, under(SAMPLER, "Mask schedule: cosine, linear, square, arccos or power:X. [default: the model's]")
]
Order = Annotated[RevealOrder | None, under(SAMPLER, "Reveal order. [default: the model's]")]
Temperature = Annotated[
    float | None, under(SAMPLER, "Temperature of the reveal order at the first step. [default: the model's]")
]
Remask = Annotated[
    float | None,
    under(SAMPLER, "Share of the tokens that the last quarter of 6 steps or more draws again. [default: the model's]"),
]

SAMPLE_EXAMPLES = """Examples:

speedrl sample "a red apple" --steps 8

speedrl sample "a red apple" "a blue cat" --count 4 --model runs/train --out sheet.png
"""
EVAL_EXAMPLES = """Examples:

speedrl eval --model embedded --model runs/train --steps 4,8,16

speedrl eval --model runs/train --steps auto --prompts prompts.txt
"""
ABLATE_EXAMPLES = """Examples:

speedrl ablate likelihood --seeds 0,1,2

speedrl ablate --quick
"""
TRAIN_EXAMPLES = """Examples:

speedrl train --steps-reward 4

speedrl train --model MeissonFlow/Meissonic --prompts hpsv2 --quality hpsv2 --lora 16 --micro-batch 1 --device cuda
"""

MEMORY_ADVICE = {
    "train": "give a smaller --micro-batch, --checkpointing, --lora 16, --train-steps 2 or a smaller --size",
    "sample": "give --precision bf16, a smaller --count or a smaller --size",
    "eval": "give --precision bf16, a smaller --batch or a smaller --size",
}

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Fewer sampling steps for masked image generators, by reinforcement learning.",
)


def print_version(wanted: bool) -> None:
    if wanted:
        from speedrl import __version__

        print(f"speedrl {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def defaults(target: str) -> dict[str, object]:
    """Keyword defaults of "module.function" of this package, read from its source; tuples as "1,2,4".

    Importing it to inspect its signature would import torch: seconds, for a page of help.
    """
    module, _, function = target.rpartition(".")
    tree = ast.parse((Path(__file__).parent / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    (node,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    optional = node.args.args[len(node.args.args) - len(node.args.defaults) :]
    arguments, given = [*optional, *node.args.kwonlyargs], [*node.args.defaults, *node.args.kw_defaults]
    pairs = zip(arguments, given, strict=True)
    values = {argument.arg: ast.literal_eval(value) for argument, value in pairs if value is not None}
    return {name: ",".join(map(str, v)) if isinstance(v, tuple) and v else v for name, v in values.items()}


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """What is imported and loaded inside is left alone by the garbage collector, then and at exit.

    Of libraries that stay to the end there is nothing to collect, and looking for it takes a quarter of the time that a
    short command takes in all.
    """
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if on:
            gc.enable()


def loading(options: dict[str, Any]) -> dict[str, Any]:
    """Takes what is for `load_generator` out of a command's options. ValueError for what cannot be read."""
    names = {"text_encoder": "text_encoder", "size": "size", "negative": "negative_prompt",
             "micro_conds": "micro_conds", "base": "base"}
    found = {name: options.pop(option, None) for name, option in names.items()}
    if (size := found["size"]) is not None:
        try:
            height, width = (int(side) for side in size.lower().split("x"))
        except ValueError:
            raise ValueError(f"--size takes height and width, like 512x768, not {size!r}") from None
        found["size"] = (height, width)
    if (given := found["micro_conds"]) is not None:
        found["micro_conds"] = numbers(given, float, option="micro-conds")
        if len(found["micro_conds"]) != 5:
            raise ValueError(f"--micro-conds takes five numbers, like 1024,1024,0,0,6, not {given!r}")
    if (precision := options.pop("precision", "fp32")) != "fp32":
        import torch

        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        if precision not in dtypes:
            raise ValueError(f"--precision must be fp32, bf16 or fp16, got {precision!r}")
        found["dtype"] = dtypes[precision]
    return {name: value for name, value in found.items() if value is not None}


def tell(prompts: list[str], generator: Any, *, guidance: float | None, negative: str | None) -> None:
    """Warns of prompts that the text encoder cuts, and of a negative prompt that nothing leads away from."""
    from speedrl.models.generator import cut_prompts

    if cut := cut_prompts(generator, list(dict.fromkeys(prompts))):
        print(f"warning: {cut} of the prompts are longer than the text encoder reads, and are cut", file=sys.stderr)
    strength = generator.guidance if guidance is None else guidance
    if negative and strength == 1:
        print("warning: --negative-prompt has no effect at guidance 1: give --guidance above 1", file=sys.stderr)


def in_one_line(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors that the user can mend are one line on standard error and exit status 2; a signal is one
    line and a status of 128 plus its number."""

    @functools.wraps(command)
    def run(**options):
        try:
            command(**options)
        except (ValueError, OSError) as error:
            print("error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
            raise typer.Exit(2) from error
        except RuntimeError as error:
            if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                raise
            given = sys.argv[1] if len(sys.argv) > 1 else ""
            print(
                f"error: not enough memory; {MEMORY_ADVICE.get(given, 'try fewer images at a time')}", file=sys.stderr
            )
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            print(str(error) or "interrupted", file=sys.stderr)
            raise typer.Exit(getattr(error, "status", 130)) from error

    return run


def forwards(target: str, **more: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function: options without a default take that of the same keyword of `target`, or of `more`.

    Errors are told by `in_one_line`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        named = inspect.getfullargspec(command).kwonlyargs
        given = {name: value for name, value in defaults(target).items() if name in named}
        command.__kwdefaults__ = given | more | (command.__kwdefaults__ or {})

        return in_one_line(command)

    return decorate


@app.command(epilog=SAMPLE_EXAMPLES)
@forwards("generation.draw")
def sample(
    *,
    prompts: Annotated[list[str], Argument(help="One row of images for each.", show_default=False)],
    steps: Annotated[
        str | None,
        Option(
            "--steps",
            "--num-inference-steps",
            help="Sampling steps. Each is a network evaluation, two with guidance. auto: what the model's step policy "
            "finds most likely for the prompt. [default: auto for a model that has one, else 8]",
        ),
    ],
    count: Annotated[int, Option(min=1, help="Images of each prompt.")] = 1,
    out: Annotated[Path, Option(help="The file to write: .png, .jpg or .webp.", dir_okay=False)] = Path("sample.png"),
    seed: Annotated[int, Option(help="An image depends on its prompt, the seed and its number of that prompt alone.")],
    model: Annotated[str, Option(help="embedded, a folder, a run's folder or a hub id.")] = "embedded",
    guidance: Annotated[
        float | None,
        under(SAMPLER, "Guidance scale; 1 is none. [default: the model's]", "--guidance", "--guidance-scale"),
    ],
    temperature: Temperature,
    schedule: Schedule,
    order: Order,
    remask: Remask,
    text_encoder: TextEncoder = None,
    size: Size = None,
    negative_prompt: Negative = None,
    micro_conds: MicroConds = None,
    base: Base = None,
    precision: Precisions = Precision.fp32,
    device: Device = "auto",
) -> None:
    """Draw images of prompts into a file."""
    how = loading(locals())
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty: say what to draw")
    with uncollected():
        from speedrl.evaluation.figures import check_suffix, contact_sheet, save_image, to_pil
        from speedrl.generation import sample as draw
        from speedrl.models.loading import load_generator
        from speedrl.system.platform import pick_device, quiet_allocator

        check_suffix(out)
        quiet_allocator()
        generator = load_generator(model, device=pick_device(device), **how)
    wanted = [prompt for prompt in prompts for _ in range(count)]
    tell(wanted, generator, guidance=guidance, negative=negative_prompt)
    images = draw(generator, wanted, steps=steps, seed=seed, guidance=guidance, temperature=temperature,
                  schedule=schedule, order=order, remask=remask)
    scale = max(1, 256 // generator.size[0])  # small images large enough to see
    if len(images) == 1:
        save_image(to_pil(images[0], scale=scale), out)
    elif len(prompts) == 1:
        save_image(contact_sheet(list(images.split(math.ceil(count**0.5))), scale=scale), out)
    else:
        save_image(contact_sheet(list(images.split(count)), labels=prompts, scale=scale), out)
    print(f"wrote {out}")


@app.command(epilog=TRAIN_EXAMPLES)
@forwards("training.train")
def train(
    *,
    model: Annotated[str, Option(help="embedded, a folder, a run's folder or a hub id.")],
    prompts: Annotated[str | None, Option(help=PROMPTS)],
    quality: Annotated[str, Option(help=f"{QUALITY}, to train by the divergence alone.")],
    steps: Annotated[str, Option(help="Step counts that the policy learns to choose from, like 1-16; 8: always 8.")],
    steps_reward: Annotated[
        float | None,
        Option(
            help="What saving all steps is worth, in units of the base's quality gap between most steps and one. "
            "[default: 0.5; 0 where --steps is one number or --quality is none]"
        ),
    ],
    iterations: Annotated[int, Option(help="Rollouts, each followed by its updates; 0 only searches the sampler.")],
    groups: Annotated[int, Option(help="Prompts of an iteration.")],
    group_size: Annotated[
        int,
        Option(
            "--group-size",
            "--num-generations",
            help="Images of each prompt. In a range of steps, an image trains its "
            "tokens only beside another of its prompt and step count.",
        ),
    ],
    lr: Annotated[float, Option("--lr", "--learning-rate", help="Learning rate.")],
    kl_weight: Annotated[
        float, Option("--kl-weight", "--beta", help="Weight of the divergence from the reference policy, in 16 steps.")
    ],
    lora: Annotated[int | None, Option(help="Train an adapter of this rank. [default: all weights]")],
    device: Device,
    out: Annotated[Path, Option(help="The run's folder.")],
    seed: Annotated[int, Option(help="The same seed trains the same model.")],
    resume: Annotated[bool, Option(help="Go on from the run's newest checkpoint; start if there is none yet.")],
    likelihood: Annotated[Likelihood, under(RL, "token: the paper's surrogate; exact: with the choice of positions.")],
    kl: Annotated[Divergence, under(RL, "Estimator of the divergence; ce is the paper's.")],
    clip_range: Annotated[float, under(RL, "Ratios are clipped to 1 +- this.")],
    updates: Annotated[int, under(RL, "Updates on each rollout.")],
    percentile: Annotated[float, under(RL, "Groups under this percentile of the quality's deviation do not train.")],
    min_quality: Annotated[
        float,
        under(
            RL,
            "Images below the mean by more than this many deviations, like -2, do not train. It is the mean of the "
            "batch, or in a range of steps of their prompt and step count.",
        ),
    ],
    advantage_std: Annotated[
        Scale, under(RL, "What advantages are divided by: the deviation of the group or the batch.")
    ],
    reward_gradient: Annotated[
        float, under(RL, "Weight of the reward's own gradient through the decoder, a white-box method.")
    ],
    train_steps: Annotated[int | None, under(RL, "Steps of each rollout that enter the loss. [default: all]")],
    guidance: Annotated[
        float | None,
        under(
            SAMPLER,
            "Guidance scale of the policy; 1 is none. [default: 1 if the model's is below 2, else the model's]",
            "--guidance",
            "--guidance-scale",
        ),
    ],
    reference_guidance: Annotated[
        float | None, under(SAMPLER, "Guidance scale of the reference policy. [default: the model's]")
    ],
    order: Order,
    schedule: Schedule,
    temperature: Temperature,
    remask: Annotated[
        float | None,
        under(SAMPLER, "Share of the tokens that the last quarter of 6 steps or more draws again. [default: 0.5]"),
    ],
    search: Annotated[int, under(SAMPLER, "Rounds of search for the sampler's scalars before training; 0: none.")],
    quality_gate: Annotated[float | None, under(REWARD, "Quality under which speed earns nothing. [default: none]")],
    quality_clip: Annotated[
        float | None, under(REWARD, "Deviations from its mean past which a quality does not count.")
    ],
    reward_weights: Annotated[list[str], under(REWARD, REWARD_WEIGHTS)],
    micro_batch: Annotated[int, under(MEMORY, "Images of one backward pass.")],
    checkpointing: Annotated[bool, under(MEMORY, "Compute blocks again in the backward pass: slower, less memory.")],
    bf16: Annotated[
        bool | None, under(MEMORY, "Compute in bf16. [default: if the device is fast at it]", "--bf16/--no-bf16")
    ],
    compile: Annotated[bool, under(MEMORY, "Use torch.compile; not with fsdp.")],
    parallel: Annotated[Parallel, under(RANKS, "Under torchrun: ddp, each rank the whole model; fsdp, each a part.")],
    offload: Annotated[bool, under(RANKS, "With fsdp: weights stay in the processor's memory between uses.")],
    trackers: Annotated[list[str], under(OUTPUT, "tensorboard or wandb, beside metrics.jsonl.", "--tracker")],
    compare: Annotated[bool, under(OUTPUT, "End with a comparison of the model before and after.")] = True,
    ema: Annotated[float, under(OUTPUT, "Decay of the moving average of the weights that is saved; 0: none.")],
    save_every: Annotated[int, under(OUTPUT, "Iterations between checkpoints.")],
    text_encoder: TextEncoder = None,
    size: Size = None,
    negative_prompt: Negative = None,
    micro_conds: MicroConds = None,
) -> None:
    """Train a model to need fewer steps, save it in the run's folder, and compare it with what it was."""
    options = dict(locals())
    del options["compare"]
    how = loading(options)
    from speedrl.system.platform import pick_device, quiet_allocator
    from speedrl.training import train

    quiet_allocator()
    trained = train(**options, loading=how)
    if os.environ.get("RANK", "0") != "0":
        return  # of torchrun's processes one speaks
    print(f"wrote {trained}")
    if compare:
        from speedrl.evaluation.reports import report

        report(model, trained, out=out, loading=how, prompts=prompts, quality=quality, reward_weights=reward_weights,
               compile=compile, device=pick_device(device))


@app.command()
@forwards("run.exporting.export")
def export(
    *,
    checkpoint: Annotated[str, Argument(help="A checkpoint's folder, or a run's for its newest.", show_default=False)],
    out: Annotated[Path, Option(help="Folder that gets model/ or adapter/, as a finished run's has.")],
    raw: Annotated[bool, Option(help="The weights themselves where their moving average was kept.")],
    merge: Annotated[bool, Option(help="Of an adapter: the model with the adapter merged.")],
    model: Annotated[
        str | None, Option(help="The model that was trained, if it is no longer where the checkpoint says.")
    ],
) -> None:
    """Make a model of a training's checkpoint, sharded or not."""
    from speedrl.run.exporting import export

    print(f"wrote {export(checkpoint, out=out, raw=raw, merge=merge, model=model)}")


def numbers(text: str, kind: type, *, option: str) -> tuple:
    """Reads "1,2,4" as a tuple of `kind`. ValueError otherwise."""
    try:
        found = tuple(kind(part) for part in text.split(","))
        if all(math.isfinite(number) for number in found):
            return found
        raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"--{option} takes numbers with commas between them, like 1,2,4, not {text!r}") from None


@app.command("eval", epilog=EVAL_EXAMPLES)
@forwards("evaluation.measuring.evaluate", model=("embedded",))
def evaluate(
    *,
    model: Annotated[list[str], Option(help="embedded, a folder, a run or a hub id; give it again for more.")],
    out: Annotated[Path, Option(help="Folder of the results, which replace earlier ones.")],
    steps: Annotated[str, Option(help="Step counts, and auto for the choice of a model's step policy.")],
    guidance: Annotated[str | None, under(SAMPLER, "Guidance scales, like 1,3. [default: the model's, and 1]")],
    temperature: Annotated[str | None, under(SAMPLER, "Temperatures of the reveal order. [default: the model's]")],
    schedule: Annotated[str | None, under(SAMPLER, "Mask schedules, like cosine,arccos. [default: the model's]")],
    order: Annotated[str | None, under(SAMPLER, "Reveal orders, like confidence,halton. [default: the model's]")],
    remask: Annotated[str | None, under(SAMPLER, "Shares of tokens to remask, like 0,0.5. [default: the model's]")],
    prompts: Annotated[str | None, Option(help=PROMPTS)],
    held_out: Annotated[str | None, Option(help="Another, of prompts that no training saw.")],
    count: Annotated[int, Option(help="Images of each prompt and seed.")],
    seeds: Annotated[int, Option(help="Repetitions, for the spread.")],
    quality: Annotated[str, Option(help=f"{QUALITY}, to measure no reward.")],
    reward_weights: Annotated[list[str], Option(help=REWARD_WEIGHTS)],
    images: Annotated[int, Option(help="Columns of the contact sheet, 0 for none.")],
    figure: Annotated[bool, Option(help="Plot quality against network evaluations.")],
    batch: Annotated[int | None, Option(help="Images drawn at a time. [default: by their size]")],
    compile: Annotated[bool, Option(help="Use torch.compile.")],
    text_encoder: TextEncoder = None,
    size: Size = None,
    negative_prompt: Negative = None,
    micro_conds: MicroConds = None,
    base: Base = None,
    precision: Precisions = Precision.fp32,
    device: Device = "auto",
) -> None:
    """Measure models over step counts: a table, results.json and a plot."""
    options = dict(locals())
    options["loading"] = loading(options)
    counts = (part.strip() for part in steps.split(","))
    options["steps"] = tuple("auto" if part == "auto" else numbers(part, int, option="steps")[0] for part in counts)
    for name in ("guidance", "temperature", "remask"):
        if options[name] is not None:
            options[name] = numbers(options[name], float, option=name)
    options |= {name: options[name] and tuple(options[name].split(",")) for name in ("schedule", "order")}
    from speedrl.evaluation.measuring import evaluate
    from speedrl.system.platform import pick_device, quiet_allocator

    quiet_allocator()
    options["device"] = pick_device(device)
    evaluate(options.pop("model"), **options)


@app.command(epilog=ABLATE_EXAMPLES)
@forwards("studies.ablations.ablate", set=())
def ablate(
    *,
    name: Annotated[
        str,
        Argument(
            help="speed-reward, likelihood, kl, percentile, low-quality, advantage-std, group-size, train-steps, "
            "updates, guidance, remask, search, lr, order, method or all."
        ),
    ],
    out: Annotated[Path, Option(help="Folder of the runs and the report; finished runs are kept.")],
    seeds: Annotated[str, Option(help="Seeds to train from, like 0,1,2.")],
    model: Annotated[str, Option(help="embedded, a folder, a run's folder or a hub id.")],
    beside: Annotated[list[str], Option(help="A model to measure beside the variants; may be repeated.")],
    device: Annotated[str, Option(help="auto, cpu, cuda, or several for the jobs to share out, like cuda:0,cuda:1.")],
    jobs: Annotated[int, Option(help="Runs at a time, each in a process of its own.")],
    quick: Annotated[bool, Option(help="Only show that everything runs: one iteration of four images.")],
    iterations: Annotated[int | None, Option(help="Iterations of each training. [default: as train]")] = None,
    groups: Annotated[int | None, Option(help="Prompts of an iteration. [default: as train]")] = None,
    group_size: Annotated[int | None, Option(help="Images of each prompt. [default: as train]")] = None,
    lr: Annotated[float | None, Option(help="Learning rate. [default: as train]")] = None,
    prompts: Annotated[str | None, Option(help=PROMPTS)] = None,
    quality: Annotated[str | None, Option(help=f"{QUALITY}. [default: as train]")] = None,
    set: Annotated[
        list[str], Option(metavar="OPTION=VALUE", help="Any other option of train, like lora=16; may be repeated.")
    ],
    eval_steps: Annotated[str, Option(help="Step counts to measure.")],
    eval_count: Annotated[int, Option(help="Images of each prompt and seed.")],
    eval_seeds: Annotated[int, Option(help="Repetitions of each measurement.")],
    eval_prompts: Annotated[str | None, Option(help="Prompts to measure. [default: the embedded model's]")] = None,
) -> None:
    """Train and measure the variants of an ablation, or of all, and put them into one report."""
    given = {"iterations": iterations, "groups": groups, "group_size": group_size, "lr": lr, "prompts": prompts,
             "quality": quality}
    training: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    training |= assignments(set, "training.train")
    measuring = {"seeds": numbers(seeds, int, option="seeds"),
                 "eval_steps": numbers(eval_steps, int, option="eval-steps")}
    evaluation = {} if eval_prompts is None else {"prompts": eval_prompts}
    from speedrl.studies.ablations import ablate
    from speedrl.system.platform import quiet_allocator

    quiet_allocator()
    ablate(name, out=out, model=model, beside=beside, device=device, jobs=jobs, quick=quick, eval_count=eval_count,
           eval_seeds=eval_seeds, evaluation=evaluation, **measuring, **training)


def assignments(texts: list[str], target: str) -> dict[str, Any]:
    """Reads "lora=16" as an option of "module.function" of this package. ValueError for what is none of its options."""
    known, found = defaults(target), {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            raise ValueError(f"--set takes OPTION=VALUE with an option of {target.split('.')[-1]}, not {text!r}")
        try:
            found[name] = ast.literal_eval(value.strip().capitalize() if value.strip() in ("true", "false") else value)
        except (ValueError, SyntaxError):
            found[name] = value.strip()  # a word
    return found
