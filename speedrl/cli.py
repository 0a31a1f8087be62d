"""The command line: each command is a function, whose signature has the options, their defaults and their help."""

import contextlib
import functools
import gc
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import CommandInfo

from speedrl.system.options import BASIC, OUTPUT, Opt, as_flags, flag_of, options_of


class Command(NamedTuple):
    """A command: the function that it forwards to, as module:function of this package, and what help says of it."""

    target: str
    help: str
    examples: tuple[str, ...] = ()
    memory: str = ""  # what to do where memory runs out


MEMORY = "give --precision bf16, fewer images at a time or a smaller --size"
COMMANDS = {
    "sample": Command("evaluation.drawing:sample_to_file", "Draw images of prompts into a file.", (
        'speedrl sample "a red apple" --steps 8',
        'speedrl sample "a red apple" "a blue cat" --count 4 --model runs/train --out sheet.png',
    ), MEMORY),
    "train": Command("training:train", "Train a model to need fewer steps, save it in the run's folder, and compare it "
                     "with what it was.", (
        "speedrl train --steps-reward 0.5",
        "speedrl train --model MeissonFlow/Meissonic --prompts hpsv2 --quality hpsv2 --lora 16 --micro-batch 1 "
        "--device cuda",
    ), "give a smaller --micro-batch, --groups or --group-size, --checkpointing, --lora 16, --train-steps 2 or a "
       "smaller --size"),
    "export": Command("run.exporting:export", "Make a model of a training's checkpoint, sharded or not."),
    "eval": Command("evaluation.measuring:evaluate", "Measure models over step counts: a table, results.json and a "
                    "plot.", (
        "speedrl eval --model embedded --model runs/train --steps 4,8,16",
        "speedrl eval --model runs/train --steps auto --prompts prompts.txt",
    ), MEMORY),
    "ablate": Command("studies.ablations:ablate", "Train and measure the variants of an ablation, or of all, and put "
                      "them into one report.", (
        "speedrl ablate likelihood --seeds 0,1,2", "speedrl ablate --quick",
    )),
}


def function_of(command: str) -> Callable:
    """The function that a command forwards to; it is imported now."""
    module, _, name = COMMANDS[command].target.partition(":")
    return getattr(importlib.import_module(f"speedrl.{module}"), name)


def functions_of(command: str) -> tuple[Callable, ...]:
    """The functions whose signatures have the options of a command, the one that it calls first."""
    return (function_of(command), compare_after) if command == "train" else (function_of(command),)


def signature_of(functions: tuple[Callable, ...]) -> inspect.Signature:
    """The options of functions as typer reads them."""
    parameters = []
    for function in functions:
        declared = inspect.signature(function).parameters
        for name, (plain, opt) in options_of(function).items():
            default, kind = declared[name].default, opt.cli or plain
            if isinstance(default, tuple):
                default = ",".join(map(str, default)) if kind is str else list(default)
            metavar = "|".join(opt.choices) or None
            if opt.positional:
                about = typer.Argument(help=opt.help, show_default=False)
            else:
                panel = None if opt.panel == BASIC else opt.panel
                about = typer.Option(*(opt.flags or (flag_of(name),)), help=opt.help, rich_help_panel=panel,
                                     metavar=metavar)
            parameters.append(inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, about],
                default=default if default is not None or not opt.positional else inspect.Parameter.empty))
    return inspect.Signature(parameters)


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


def in_one_line(
    command: Callable[..., Any], options: Mapping[str, tuple[Any, Opt]] | None = None, memory: str = ""
) -> Callable[..., None]:
    """A command whose errors that the user can mend are one line on standard error and exit status 2; a signal is one
    line and a status of 128 plus its number. `options` are those that the messages may name."""

    @functools.wraps(command)
    def run(*arguments: Any, **given: Any) -> None:
        try:
            command(*arguments, **given)
        except (ValueError, OSError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            print("error:", as_flags(said, options or {}), file=sys.stderr)
            raise typer.Exit(2) from error
        except RuntimeError as error:
            if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                raise
            print(f"error: not enough memory; {memory or 'try fewer images at a time'}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            print(str(error) or "interrupted", file=sys.stderr)
            raise typer.Exit(getattr(error, "status", 130)) from error

    return run


def compare_after(compare: Annotated[bool, Opt("End with a comparison of the model before and after.",
                                               OUTPUT)] = True) -> None:
    """What `speedrl train` has beside the options of `train`."""


def run_command(name: str, function: Callable, /, *, compare: bool = False, **options: Any) -> None:
    """Calls the function of a command; a training ends with a comparison."""
    from speedrl.system.platform import pick_device, quiet_allocator

    quiet_allocator()
    result = function(**options)
    if name not in ("train", "export") or os.environ.get("RANK", "0") != "0":
        return  # of torchrun's processes one speaks
    print(f"wrote {result}")
    if compare:
        from speedrl.evaluation.reports import report

        kept = ("prompts", "quality", "reward_weights", "compile", "out", "text_encoder", "size", "negative_prompt",
                "micro_conds")
        report(options["model"], result, device=pick_device(options["device"]),
               **{option: options[option] for option in kept})


class Prompted(TyperCommand):
    """A command that may have prompts: where it refuses an unknown option, it says how one that begins with "-" is
    given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if type(error).__name__ == "NoSuchOption" and ctx.info_name == "sample":  # click's, or that of typer's copy
                error.message += ". A prompt that begins with - goes after --"  # type: ignore[attr-defined]
            raise


class Commands(TyperGroup):
    """Commands whose functions are imported when they are called, not to be listed: torch takes seconds."""

    listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self.listing = False

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        command = COMMANDS[cmd_name]
        if self.listing:
            return TyperCommand(cmd_name, help=command.help)
        with uncollected():
            functions = functions_of(cmd_name)
        options = {name: option for each in functions for name, option in options_of(each).items()}
        run = in_one_line(functools.partial(run_command, cmd_name, functions[0]), options, command.memory)
        run.__signature__ = signature_of(functions)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
        epilog = "Examples:\n\n" + "\n\n".join(command.examples) if command.examples else None
        info = CommandInfo(cmd_name, cls=Prompted, callback=run, help=command.help, epilog=epilog)
        return typer.main.get_command_from_info(info, pretty_exceptions_short=True, rich_markup_mode="markdown")


app = typer.Typer(
    cls=Commands,
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
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
