"""Options declared once: in a function's signature, which Python callers use and the command line reads."""

import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

BASIC, RL, SAMPLER, REWARD = "Options", "Reinforcement learning", "Sampler", "Reward"
MEMORY, RANKS, OUTPUT, MODEL = "Memory and speed", "Several processes", "Output", "Model"


class Opt(NamedTuple):
    """What `Annotated[type, Opt(...)]` says of a parameter: the command line's help, and what its values must be."""

    help: str
    panel: str = BASIC
    flags: tuple[str, ...] = ()  # in place of --name
    cli: Any = None  # the type on the command line, where the parameter takes more
    positional: bool = False
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: Collection[str] = ()


def options_of(function: Callable) -> dict[str, tuple[Any, Opt]]:
    """The parameters of a function that have an `Opt`, each with its plain type."""
    hints = get_type_hints(function, include_extras=True)
    found: dict[str, tuple[Any, Opt]] = {}
    for name in inspect.signature(function).parameters:
        if get_origin(hints.get(name)) is Annotated:
            plain, *extras = get_args(hints[name])
            found.update((name, (plain, extra)) for extra in extras if isinstance(extra, Opt))
            if plain is bool and not found[name][1].flags:  # on the command line it can be switched off too
                flag = flag_of(name)
                found[name] = (plain, found[name][1]._replace(flags=(f"{flag}/--no-{flag[2:]}",)))
    return found


def check_options(function: Callable, values: Mapping[str, Any]) -> None:
    """ValueError for a value that its `Opt` excludes, or that is not finite; None is left alone."""
    for name, (_, opt) in options_of(function).items():
        value = values.get(name)
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, str) and opt.choices and each not in opt.choices:
                raise ValueError(f"`{name}` must be {', '.join(opt.choices)}, got {each!r}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value) and not (value == -math.inf == opt.least):
            raise ValueError(f"`{name}` must be a finite number, got {value}")
        bounds = [(opt.above, lambda x, y: x > y, "above"), (opt.least, lambda x, y: x >= y, "at least"),
                  (opt.most, lambda x, y: x <= y, "at most"), (opt.below, lambda x, y: x < y, "below")]
        wrong = [bound for bound, holds, _ in bounds if bound is not None and not holds(value, bound)]
        if wrong:
            said = " and ".join(f"{word} {bound:g}" for bound, _, word in bounds if bound is not None)
            raise ValueError(f"`{name}` must be {said}, got {value:g}")


def flag_of(name: str, opt: Opt | None = None) -> str:
    """How a parameter is called on the command line: its first flag, or --name."""
    return opt.flags[0].partition("/")[0] if opt and opt.flags else "--" + name.replace("_", "-")


def as_flags(message: str, options: Mapping[str, tuple[Any, Opt]]) -> str:
    """A function's message with its parameters, in backticks there, as options of the command line."""

    def named(match: re.Match) -> str:
        return flag_of(match[1], options[match[1]][1] if match[1] in options else None)

    return re.sub(r"`([a-z]\w*)`", named, message)


def listed(value: Any, kind: Callable[[str], Any], *, name: str) -> tuple | None:
    """The values of "1,2,4", or of a sequence or one value, as `kind`; None stays None. ValueError otherwise."""
    if value is None:
        return None
    alone = isinstance(value, int | float)
    parts: Any = value.split(",") if isinstance(value, str) else [value] if alone else value
    try:
        found = tuple(kind(part.strip() if isinstance(part, str) else part) for part in parts)
    except (ValueError, OverflowError):
        found = ()
    if not found or any(isinstance(x, float) and not math.isfinite(x) for x in found):
        raise ValueError(f"`{name}` takes values with commas between them, like 1,2,4, not {value!r}")
    return found
