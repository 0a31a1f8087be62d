"""The command line. Each command forwards to one function, whose keyword defaults are the options' defaults."""

import ast
import contextlib
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

QUALITY = "Names and weights, like hpsv2=1,clip=0.5: embedded, hpsv2, imagereward, clip, a folder, MODULE:FUNCTION."
PROMPTS = (
    "Text file, one prompt a line; JSONL with a prompt field; or a set by name: hpsv2, hpsv2-photo, -anime, "
    "-concept-art or -paintings, partiprompts, geneval. [default: the embedded model's]"
)
REWARD_WEIGHTS = "NAME=FILE: weights of a quality in place of the published ones."

TextEncoder = Annotated[str | None, Option(help="A CLIP's folder or hub id. [default: the model's own]")]
Size = Annotated[str | None, Option(help="Height and width in pixels, like 512x768. [default: the model's]")]
Negative = Annotated[str | None, Option(help="What guidance leads away from. [default: the model's]")]
MicroConds = Annotated[
    str | None, Option(help="Width, height, crop top, crop left, aesthetic score. [default: the size,0,0,6]")
]
Schedule = Annotated[
    str | None, Option(help="Mask schedule: cosine, linear, square, arccos or power:X. [default: the model's]")
]
Order = Annotated[str | None, Option(help="Order of reveal: confidence, random or halton. [default: the model's]")]
Revise = Annotated[
    float | None,
    Option(help="Share of the tokens to draw again in the last quarter of 6 steps or more. [default: the model's]"),
]
Precision = Annotated[str, Option(help="fp32, bf16 or fp16, of transformer and text encoder.")]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Fewer sampling steps for masked image generators, by reinforcement learning.",
)


def defaults(target: str) -> dict[str, object]:
    """Keyword defaults of "module.function" of this package, read from its source; tuples as "1,2,4".

    Importing it to inspect its signature would import torch: seconds, for a page of help.
    """
    module, _, function = target.rpartition(".")
    tree = ast.parse((Path(__file__).parent / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    (node,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    optional = node.args.args[len(node.args.args) - len(node.args.defaults) :]
    pairs = [*zip(optional, node.args.defaults, strict=True)]
    pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
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
    taken = {name: options.pop(name, None) for name in ("text_encoder", "size", "negative_prompt", "micro_conds")}
    found = {"text_encoder": taken["text_encoder"], "negative": taken["negative_prompt"]}
    if taken["size"] is not None:
        try:
            height, width = (int(side) for side in taken["size"].lower().split("x"))
        except ValueError:
            raise ValueError(f"--size takes height and width, like 512x768, not {taken['size']!r}") from None
        found["size"] = (height, width)
    found["micro_conds"] = numbers(taken["micro_conds"], float, option="micro-conds")
    if found["micro_conds"] is not None and len(found["micro_conds"]) != 5:
        raise ValueError(f"--micro-conds takes five numbers, like 1024,1024,0,0,6, not {taken['micro_conds']!r}")
    if (precision := options.pop("precision", "fp32")) != "fp32":
        import torch

        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        if precision not in dtypes:
            raise ValueError(f"unknown precision {precision!r}: choose fp32, bf16 or fp16")
        found["dtype"] = dtypes[precision]
    return {name: value for name, value in found.items() if value is not None}


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
            advice = "try --precision bf16, fewer pictures at a time (--batch, --micro-batch), or a smaller --size"
            print(f"error: not enough memory; {advice}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            print(str(error) or "interrupted", file=sys.stderr)
            raise typer.Exit(getattr(error, "status", 130)) from error

    return run


def forwards(target: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function: options without a default take that of the same keyword of `target`.

    Errors are told by `in_one_line`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        named = inspect.getfullargspec(command).kwonlyargs
        given = {name: value for name, value in defaults(target).items() if name in named}
        command.__kwdefaults__ = given | (command.__kwdefaults__ or {})

        return in_one_line(command)

    return decorate


@app.command()
@forwards("generation.draw")
def sample(
    *,
    prompts: Annotated[list[str], Argument(help="One row of pictures for each.", show_default=False)],
    steps: Annotated[
        str | None,
        Option(
            help="Sampling steps; each is a call of the network, two with guidance. auto: the model chooses, auto:8: "
            "at most 8. [default: auto for a model that was trained to, else 8]"
        ),
    ],
    count: Annotated[int, Option(min=1, help="Pictures of each prompt.")] = 1,
    out: Annotated[Path, Option(help="The PNG to write.", dir_okay=False)] = Path("sample.png"),
    seed: Annotated[int, Option(help="The same seed draws the same pictures.")],
    model: Annotated[str, Option(help="embedded, a folder, a run's folder or a hub id.")] = "embedded",
    guidance: Annotated[float | None, Option(help="Strength of the prompt; 1 is none. [default: the model's]")],
    temperature: Annotated[
        float | None, Option(help="Noise in the order of reveal, at the first step. [default: the model's]")
    ],
    schedule: Schedule,
    order: Order,
    revise: Revise,
    text_encoder: TextEncoder = None,
    size: Size = None,
    negative_prompt: Negative = None,
    micro_conds: MicroConds = None,
    precision: Precision = "fp32",
    device: Annotated[str, Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Draw pictures of prompts into a PNG."""
    how = loading(locals())
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty: say what to draw")
    with uncollected():
        from speedrl.generation import contact_sheet, save_png, to_pil
        from speedrl.generation import sample as draw
        from speedrl.models.checkpoint import load_generator
        from speedrl.system.platform import quiet_allocator

        quiet_allocator()
        generator = load_generator(model, device=device, **how)
    wanted = [prompt for prompt in prompts for _ in range(count)]
    options = {"guidance": guidance, "temperature": temperature, "schedule": schedule, "order": order,
               "revise": revise}  # fmt: skip
    pictures = draw(generator, wanted, steps=steps, seed=seed, **options)
    scale = max(1, 256 // generator.size[0])  # small pictures large enough to see
    if len(pictures) == 1:
        save_png(to_pil(pictures[0], scale=scale), out)
    elif len(prompts) == 1:
        save_png(contact_sheet(list(pictures.split(math.ceil(count**0.5))), scale=scale), out)
    else:
        save_png(contact_sheet(list(pictures.split(count)), labels=prompts, scale=scale), out)
    print(f"wrote {out}")


@app.command()
@forwards("training.train")
def train(
    *,
    out: Annotated[Path, Option(help="The run's folder.")],
    model: Annotated[str, Option(help="embedded, a folder, a run's folder or a hub id.")],
    prompts: Annotated[str | None, Option(help=PROMPTS)],
    quality: Annotated[str, Option(help=QUALITY)],
    steps: Annotated[
        str,
        Option(
            help="Sampling steps: 8; 2-16 to draw them; auto:8, or auto, for the policy to choose from 4 to 8: half "
            "reveal, and it revises as long as that pays."
        ),
    ],
    shared_steps: Annotated[bool, Option(help="With a range: all pictures of a prompt have the same number.")],
    pace_lr: Annotated[float, Option(help="With auto: the learning rate of what chooses.")],
    steps_reward: Annotated[float, Option(help="Weight of the speed reward: what saving every network call is worth.")],
    quality_gate: Annotated[float | None, Option(help="Quality under which speed earns nothing. [default: none]")],
    quality_clip: Annotated[
        float | None, Option(help="Standard deviations from its mean past which a quality does not count.")
    ],
    reward_weights: Annotated[list[str], Option(help=REWARD_WEIGHTS)],
    iterations: Annotated[int, Option(help="Rollouts, each followed by its updates.")],
    groups: Annotated[int, Option(help="Prompts of an iteration.")],
    group_size: Annotated[int, Option(help="Pictures of each prompt.")],
    lr: Annotated[float, Option(help="Learning rate.")],
    warmup: Annotated[int, Option(help="Iterations over which the learning rate rises.")],
    eps: Annotated[float, Option(help="Adam's epsilon; 1e-8 moves all weights alike, 1e-3 as their gradients.")],
    guidance: Annotated[float, Option(help="Guidance of sampling and training; 1 is none.")],
    reference_guidance: Annotated[
        float | None, Option(help="Guidance of the reference that the divergence is from. [default: the model's]")
    ],
    temperature: Annotated[
        float | None, Option(help="Noise in the order of reveal, at the first step. [default: the model's]")
    ],
    schedule: Schedule,
    order: Order,
    revise: Annotated[
        float,
        Option(help="Share of the tokens that the trained model draws again in the last quarter of 6 steps or more."),
    ],
    likelihood: Annotated[str, Option(help="token, sequence or exact.")],
    clip_range: Annotated[float, Option(help="Ratios are clipped to 1 +- this.")],
    kl: Annotated[str, Option(help="Divergence: ce, reverse, k1, k2, k3 or none.")],
    kl_weight: Annotated[float, Option(help="Weight of the divergence in 16 steps or more.")],
    kl_falloff: Annotated[
        float, Option(help="In fewer it weighs (steps / 16) to this power of that; 0: the same in all.")
    ],
    percentile: Annotated[
        float, Option(help="Groups under this percentile of the quality's standard deviation do not train.")
    ],
    least_quality: Annotated[float | None, Option(help="Pictures under this quality do not train. [default: all do]")],
    trained: Annotated[int | None, Option(help="Steps of each rollout that train. [default: all]")],
    tune: Annotated[bool, Option(help="Also learn how steps are sampled: schedule, temperature, sharpness.")],
    tune_rate: Annotated[float, Option(help="How fast that is learned at first.")],
    credit: Annotated[
        str | None,
        Option(
            help="token: of the reward's slope at it; step: of what it changed; rollout: of the whole reward. "
            "[default: token if the reward has a gradient, else step]"
        ),
    ],
    gae_lambda: Annotated[float, Option(help="How much of the later steps' credit a step has too, 0 to 1.")],
    early_credit: Annotated[
        float, Option(help="With credit token: the whole reward's weight at first tokens; wants --kl-falloff 0.")
    ],
    lora: Annotated[int | None, Option(help="Train an adapter of this rank. [default: all weights]")],
    lora_alpha: Annotated[float | None, Option(help="Strength of the adapter over its rank. [default: the rank]")],
    lora_targets: Annotated[
        str | None, Option(help="Layers that get an adapter, like to_q,to_k,to_v. [default: all linear ones]")
    ],
    merge: Annotated[bool, Option(help="Also save the model with its adapter merged.")],
    ema: Annotated[float, Option(help="Decay of the moving average of the weights, which is what is saved; 0: none.")],
    checkpointing: Annotated[bool, Option(help="Compute blocks again in the backward pass: slower, less memory.")],
    updates: Annotated[int, Option(help="Updates on each rollout.")],
    micro_batch: Annotated[int, Option(help="Pictures of one backward pass.")],
    clip_grad: Annotated[float, Option(help="Largest norm of the gradient.")],
    max_skipped: Annotated[int, Option(help="Updates in a row without a finite gradient that end the training.")],
    seed: Annotated[int, Option(help="The same seed trains the same model.")],
    save_every: Annotated[int, Option(help="Iterations between checkpoints.")],
    keep_checkpoints: Annotated[int, Option(help="The newest checkpoints, which are kept.")],
    resume: Annotated[bool, Option(help="Go on from the run's newest checkpoint; start if there is none yet.")],
    parallel: Annotated[str, Option(help="Under torchrun: ddp, each rank the whole model, or fsdp, each a part.")],
    offload: Annotated[bool, Option(help="With fsdp: weights stay in the processor's memory between uses.")],
    trackers: Annotated[list[str], Option("--tracker", help="tensorboard or wandb, beside metrics.jsonl.")],
    compile: Annotated[bool, Option(help="Use torch.compile; not with fsdp.")],
    bf16: Annotated[
        bool | None, Option("--bf16/--no-bf16", help="Compute in bf16. [default: if the device is fast at it]")
    ],
    compare: Annotated[bool, Option(help="End with a comparison of the model before and after.")] = True,
    text_encoder: TextEncoder = None,
    size: Size = None,
    negative_prompt: Negative = None,
    micro_conds: MicroConds = None,
    device: Annotated[str, Option(help="cpu, cuda, ...")],
) -> None:
    """Train a model to need fewer steps, save it in the run's folder, and compare it with what it was."""
    options = dict(locals())
    del options["compare"]
    how = loading(options)
    from speedrl.system.platform import quiet_allocator
    from speedrl.training import train

    quiet_allocator()
    trained = train(**options, loading=how)
    if os.environ.get("RANK", "0") != "0":
        return  # of torchrun's processes one speaks
    print(f"wrote {trained}")
    if compare:
        from speedrl.evaluation.reports import report

        shared = {"prompts": prompts, "quality": quality, "reward_weights": reward_weights, "compile": compile,
                  "device": device}  # fmt: skip
        report(model, trained, out=out, loading=how, **shared)


@app.command()
@forwards("run.exporting.export")
def export(
    *,
    checkpoint: Annotated[str, Argument(help="A checkpoint's folder, or a run's for its newest.", show_default=False)],
    out: Annotated[Path, Option(help="Folder that gets model/ or adapter/, as a finished run's has.")],
    raw: Annotated[bool, Option(help="The weights themselves where their moving average was kept.")],
) -> None:
    """Make a model of a training's checkpoint, sharded or not."""
    from speedrl.run.exporting import export

    print(f"wrote {export(checkpoint, out=out, raw=raw)}")


def numbers(text: str | None, kind: type, *, option: str) -> tuple | None:
    """Reads "1,2,4" as a tuple of `kind`; None stays None. ValueError otherwise."""
    if text is None:
        return None
    try:
        found = tuple(kind(part) for part in text.split(","))
        if all(math.isfinite(number) for number in found):
            return found
        raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"--{option} takes numbers with commas between them, like 1,2,4, not {text!r}") from None


@app.command("eval")
@forwards("evaluation.measuring.evaluate")
def evaluate(
    *,
    model: Annotated[list[str], Option(help="embedded, a folder, a run or a hub id; give it again for more.")] = (
        "embedded",
    ),
    out: Annotated[Path, Option(help="Folder of the results; rows that it has are kept.")],
    steps: Annotated[str, Option(help="Step counts, and auto of models that choose theirs.")],
    guidance: Annotated[str | None, Option(help="Guidances, like 1,3. [default: the model's, and 1]")],
    temperature: Annotated[str | None, Option(help="Temperatures of the reveal. [default: the model's]")],
    schedule: Annotated[str | None, Option(help="Mask schedules, like cosine,arccos. [default: the model's]")],
    order: Annotated[str | None, Option(help="Orders of reveal, like confidence,halton. [default: the model's]")],
    revise: Annotated[str | None, Option(help="Shares of tokens to draw again, like 0,0.2. [default: the model's]")],
    prompts: Annotated[str | None, Option(help=PROMPTS)],
    held_out: Annotated[str | None, Option(help="Another, of prompts that no training saw.")],
    count: Annotated[int, Option(help="Pictures of each prompt and seed.")],
    seeds: Annotated[int, Option(help="Repetitions, for the spread.")],
    quality: Annotated[str, Option(help=QUALITY)],
    reward_weights: Annotated[list[str], Option(help=REWARD_WEIGHTS)],
    pictures: Annotated[int, Option(help="Columns of the contact sheet, 0 for none.")],
    figure: Annotated[bool, Option(help="Plot quality against network calls.")],
    batch: Annotated[int | None, Option(help="Pictures drawn at a time. [default: by their size]")],
    compile: Annotated[bool, Option(help="Use torch.compile.")],
    text_encoder: TextEncoder = None,
    size: Size = None,
    negative_prompt: Negative = None,
    micro_conds: MicroConds = None,
    precision: Precision = "fp32",
    device: Annotated[str, Option(help="cpu, cuda, ...")],
) -> None:
    """Measure models over step counts: a table, results.json and a plot."""
    options = dict(locals())
    options["loading"] = loading(options)
    counts = (part.strip() for part in steps.split(","))
    options["steps"] = tuple("auto" if part == "auto" else numbers(part, int, option="steps")[0] for part in counts)
    options["guidance"] = numbers(guidance, float, option="guidance")
    options["temperature"] = numbers(temperature, float, option="temperature")
    options["revise"] = numbers(revise, float, option="revise")
    options |= {name: options[name] and tuple(options[name].split(",")) for name in ("schedule", "order")}
    from speedrl.evaluation.measuring import evaluate
    from speedrl.system.platform import quiet_allocator

    quiet_allocator()
    evaluate(options.pop("model"), **options)


@app.command()
@forwards("studies.ablations.ablate")
def ablate(
    *,
    name: Annotated[
        str,
        Argument(
            help="speed-reward, shared-steps, kl, credit, tuning, likelihood, percentile, low-quality, group-size, "
            "guidance, trained-steps, lr, any-count, order or all."
        ),
    ],
    out: Annotated[Path, Option(help="Folder of the runs and the report; finished runs are kept.")],
    seeds: Annotated[str, Option(help="Seeds to train from, like 0,1,2.")],
    model: Annotated[str, Option(help="embedded, a folder, a run's folder or a hub id.")],
    device: Annotated[str, Option(help="cpu, cuda, or several for the jobs to share out, like cuda:0,cuda:1.")],
    jobs: Annotated[int, Option(help="Runs at a time, each in a process of its own.")],
    quick: Annotated[bool, Option(help="Only show that everything runs: one iteration of four pictures.")],
    iterations: Annotated[int | None, Option(help="Iterations of each training. [default: as train]")] = None,
    groups: Annotated[int | None, Option(help="Prompts of an iteration. [default: as train]")] = None,
    group_size: Annotated[int | None, Option(help="Pictures of each prompt. [default: as train]")] = None,
    lr: Annotated[float | None, Option(help="Learning rate. [default: as train]")] = None,
    prompts: Annotated[str | None, Option(help=PROMPTS)] = None,
    quality: Annotated[str | None, Option(help=QUALITY)] = None,
    set: Annotated[
        list[str], Option(metavar="OPTION=VALUE", help="Any other option of train, like lora=16; may be repeated.")
    ] = (),
    eval_steps: Annotated[str, Option(help="Step counts to measure.")],
    eval_count: Annotated[int, Option(help="Pictures of each prompt and seed.")],
    eval_seeds: Annotated[int, Option(help="Repetitions of each measurement.")],
    eval_prompts: Annotated[str | None, Option(help="Prompts to measure. [default: the embedded model's]")] = None,
) -> None:
    """Train and measure the variants of an ablation, or of all, and put them into one report."""
    training = {"iterations": iterations, "groups": groups, "group_size": group_size, "lr": lr, "prompts": prompts,
                "quality": quality}  # fmt: skip
    training = {name: value for name, value in training.items() if value is not None} | assignments(
        set, "training.train"
    )
    measuring = {"eval_steps": numbers(eval_steps, int, option="eval-steps"), "eval_count": eval_count,
                 "eval_seeds": eval_seeds}  # fmt: skip
    evaluation = {} if eval_prompts is None else {"prompts": eval_prompts}
    seeds = numbers(seeds, int, option="seeds")
    from speedrl.studies.ablations import ablate
    from speedrl.system.platform import quiet_allocator

    quiet_allocator()
    ablate(name, out=out, seeds=seeds, model=model, device=device, jobs=jobs, quick=quick, evaluation=evaluation,
           **measuring, **training)  # fmt: skip


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
