"""Quality rewards by name, as functions, and several of them: loaded, and tried before they are relied on."""

import functools
import importlib
import importlib.util
import itertools
import math
import os
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from speedrl.rewards.scorers import Score, clip_score, hpsv2_score, imagereward_score
from speedrl.system.errors import one_line

Quality = str | Score | Mapping[str, float | Score | tuple[Score, float]]  # as of `load_qualities`

PACKAGE = str(Path(__file__).parents[1])
EMBEDDED = Path(__file__).parents[1] / "models" / "embedded" / "reward"
PUBLISHED = {  # a short name and what open_clip calls it
    "clip": ("ViT-L-14", "openai"),
    "clip-l": ("ViT-L-14", "openai"),
    "clip-h": ("ViT-H-14", "laion2b_s32b_b79k"),
}
EXAMPLES = ("a red apple", "two dogs")  # what a reward is tried on where no prompts are known
SIZE = (64, 64)  # height and width of the images then


def import_function(name: str) -> Callable:
    """The function of "module:function" or "path/to/file.py:function".

    A module of the working directory is preferred to another of its name, like Python's own `test`. Raises what the
    import raises, AttributeError without such a function, TypeError for something else.
    """
    module, _, function = name.rpartition(":")
    if module.endswith(".py"):
        found = run_file(Path(module))
    else:
        file = Path(*module.split(".")).with_suffix(".py").resolve()
        with first_on_path(os.getcwd()):
            found = importlib.import_module(module)
        if file.is_file() and Path(getattr(found, "__file__", None) or "").resolve() != file:
            found = run_file(file)  # another module of this name was imported before
    found = getattr(found, function)
    if not callable(found):
        raise TypeError(f"{name} is no function")
    return found


def run_file(path: Path) -> ModuleType:
    """A Python file as a module, which finds the files beside it."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"_reward_{path.stem}", path)
    assert spec and spec.loader  # as of every .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with first_on_path(str(path.resolve().parent)):
        spec.loader.exec_module(module)
    return module


@contextmanager
def first_on_path(folder: str) -> Iterator[None]:
    """Within, modules are looked for in a folder first; later, for what is imported when it is called, last."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def described(error: Exception) -> str:
    """An error in one line; of code that is not ours also its type, and the user's file and line that raised it."""
    said, frames = one_line(error), traceback.extract_tb(error.__traceback__)
    if not frames or frames[-1].filename.startswith(PACKAGE):
        return said
    libraries = (PACKAGE, sysconfig.get_paths()["stdlib"], "<frozen")
    own = [f for f in frames if not f.filename.startswith(libraries) and "-packages" not in f.filename]
    said = said if said == type(error).__name__ else f"{type(error).__name__}: {said}"
    return f"{said} ({own[-1].filename}:{own[-1].lineno})" if own else said


def parse_quality(quality: Quality) -> dict[str, float]:
    """Weights by name: of "hpsv2=1,imagereward=0.5,clip", 1 where none is given; none of "none". ValueError otherwise.

    A function has its own name, and a dictionary weights, functions, or pairs of both by name.
    """
    if callable(quality):
        return {getattr(quality, "__name__", type(quality).__name__): 1.0}
    if isinstance(quality, Mapping):
        weights = {name: weight_of(name, value) for name, value in quality.items()}
    elif quality.strip() == "none":
        return {}
    else:
        weights = parse_weights(quality)
    if not any(weights.values()):
        raise ValueError(f"`quality` {quality!r}: every weight is 0; to train without a reward, give `quality` none")
    return weights


def weight_of(name: str, value: float | Score | tuple[Score, float]) -> float:
    """The weight in an entry of a dictionary of qualities."""
    weight = value[1] if isinstance(value, tuple) and len(value) == 2 else 1.0 if callable(value) else value
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"quality {name}: give a weight, a function, or (function, weight), not {value!r}")
    return float(weight)


def parse_weights(text: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, weight = part.strip().rpartition("=")
        name, weight = (name, weight) if equals else (weight, "1")
        try:
            value = float(weight)
        except ValueError:
            raise ValueError(f"`quality` {part.strip()!r}: {weight!r} is not a number; write NAME=WEIGHT") from None
        if not name or name.endswith("=") or name in weights or not math.isfinite(value):
            raise ValueError(f"`quality` {text!r}: write each name once, like hpsv2=1,imagereward=0.5")
        if name == "none":
            raise ValueError("`quality` none stands alone: leave it out, or leave out the others")
        weights[name] = value
    return weights


def loader(name: str, *, device: torch.device | str, weights: str | None, bf16: bool | None) -> Callable[[], Score]:
    """What loads the quality `name` of `load_quality`. ValueError where there is none of that name."""
    if name == "hpsv2":
        return functools.partial(hpsv2_score, device=device, weights=weights, bf16=bf16)
    if name == "imagereward":
        return functools.partial(imagereward_score, device=device, weights=weights, bf16=bf16)
    clip = functools.partial(clip_score, device=device, bf16=bf16)
    if name in PUBLISHED:
        architecture, published = PUBLISHED[name]
        return functools.partial(clip, architecture, weights=weights, published=published)
    if name.startswith("clip:") and name != "clip:":
        architecture, _, published = name.removeprefix("clip:").partition(":")
        if not (weights or published):
            raise ValueError(f"reward {name}: say which weights, clip:ARCHITECTURE:WEIGHTS, or give `reward_weights`")
        return functools.partial(clip, architecture, weights=weights, published=published or None)
    if weights is not None:
        raise ValueError(f"reward {name}: `reward_weights` are for hpsv2, imagereward and clip only")
    folder = EMBEDDED if name == "embedded" else Path(name)
    if (folder / "open_clip_config.json").is_file():
        return functools.partial(clip, f"local-dir:{folder}")
    if name == "embedded":
        raise ValueError("reward embedded: it is not in this installation: rebuild it, see experiments/")
    if all(name.rpartition(":")) and not folder.exists():
        return functools.partial(import_function, name)
    raise ValueError(
        f"there is no reward {name!r}: give embedded, hpsv2, imagereward, clip, clip:ARCHITECTURE:WEIGHTS, "
        "a folder with open_clip_config.json, MODULE:FUNCTION or FILE.py:FUNCTION"
    )


def working_directory() -> str | None:
    """The working directory, None where it was removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


STATES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {  # of the process: how each is read and set
    "torch's gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    # None where it was the processor: to set that too makes every call slower
    "torch's default device": (torch.get_default_device,
                               lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's deterministic algorithms": (torch.are_deterministic_algorithms_enabled,
                                         torch.use_deterministic_algorithms),
    "torch's float32 matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "the working directory": (working_directory, os.chdir),
}


@contextmanager
def unchanged(name: str, said: set[str]) -> Iterator[None]:
    """Within, the code of the reward `name` runs: STATES that it changes are set back at the end, and those that were
    not `said` before are warned of."""
    before = {what: read() for what, (read, _) in STATES.items()}
    try:
        yield
    finally:
        for what, (read, write) in STATES.items():
            if (now := read()) != before[what] and before[what] is not None:
                write(before[what])
                if what not in said:
                    said.add(what)
                    change = f"{what} from {before[what]} to {now}"
                    warnings.warn(f"reward {name}: its code changed {change}, which is set back", stacklevel=4)


def alike(name: str, score: Score, said: set[str], *, foreign: bool) -> Score:
    """The same score, called alike wherever it is: outside autocast and inference mode, with a gradient where the
    images have one, as no other is ever asked for, and STATES stay. One that is `foreign` gets images of its own, and
    may change them; what it returns is no tensor that it keeps."""

    @functools.wraps(score)
    def scored(images: Tensor, prompts: Sequence[str]) -> Tensor:
        slope = images.requires_grad and torch.is_grad_enabled()
        plain = torch.autocast(images.device.type, enabled=False)
        with torch.inference_mode(False), torch.set_grad_enabled(slope), plain, unchanged(name, said):
            found = score(images.clone() if foreign else images, list(prompts))
            return found.clone() if isinstance(found, Tensor) else found

    return scored


def samples(prompts: Sequence[str] | None, size: tuple[int, int], device: torch.device | str) -> tuple[Tensor, list]:
    """Two images [2, 3, H, W] of a size, and two prompts: the first of those that there are."""
    images = torch.linspace(0, 1, 2 * 3 * size[0] * size[1], device=device).view(2, 3, *size)
    return images, list(itertools.islice(itertools.cycle(prompts or EXAMPLES), 2))


def load_quality(
    quality: str | Score = "embedded",
    *,
    device: torch.device | str = "cpu",
    weights: str | None = None,
    bf16: bool | None = None,
    prompts: Sequence[str] | None = None,
    size: tuple[int, int] = SIZE,
    name: str | None = None,
) -> Score:
    """A quality reward: score(images float [B, 3, H, W] in [0, 1], B prompts) -> float32 [B].

    `quality` is such a function, or one of
      embedded                    the small CLIP that comes with the embedded model
      hpsv2, imagereward          the published models of human preference
      clip, clip-l, clip-h        CLIP ViT-L-14 (OpenAI's) and ViT-H-14 (LAION's)
      clip:ARCHITECTURE:WEIGHTS   any of open_clip's, with the name of published weights
      FOLDER                      a folder in open_clip's layout, with open_clip_config.json, weights and tokenizer
      MODULE:FUNCTION             your own function with score's signature
      FILE.py:FUNCTION            the same, in a file
    `weights` is a file in place of the published one; `bf16` by default where it is fast. The reward is tried here on
    two images of height and width `size` and on the first two of `prompts`; errors call it `name`. ValueError, one
    line, where there is no such reward, it cannot be loaded, raises, or gives something else than B finite numbers in
    float32.
    """
    name = name or (next(iter(parse_quality(quality))) if callable(quality) else quality)
    load: Callable[[], Score]
    said: set[str] = set()
    load = (lambda: quality) if callable(quality) else loader(quality, device=device, weights=weights, bf16=bf16)
    foreign = callable(quality) or getattr(load, "func", None) is import_function
    try:
        with unchanged(name, said):
            score = alike(name, load(), said, foreign=foreign)
    except Exception as error:  # open_clip, safetensors and the user's module raise many kinds
        raise ValueError(f"reward {name}: cannot be loaded: {described(error)}") from error
    tried = rate(name, score, *samples(prompts, size, device), cast=False)
    if tried.dtype != torch.float32:
        raise ValueError(f"reward {name}: must give float32, gave {tried.dtype}; end it with .float()")
    return score


def load_qualities(
    quality: Quality,
    *,
    device: torch.device | str = "cpu",
    weights: Sequence[str] = (),
    bf16: bool | None = None,
    prompts: Sequence[str] | None = None,
    size: tuple[int, int] = SIZE,
) -> tuple[dict[str, Score], dict[str, float]]:
    """The scores of "hpsv2=1,imagereward=0.5" and their weights, both by name. `weights` are files, "NAME=PATH" each.

    `quality` may be a function, or a dictionary: {"hpsv2": 1.0, "mine": function, "other": (function, 0.5)}. "none"
    gives ({}, {}). A quality of weight 0 is scored and logged but not rewarded: it can tell whether the others are
    being gamed. The rest as of `load_quality`.
    """
    wanted, files = parse_quality(quality), {}
    functions = quality if isinstance(quality, Mapping) else dict.fromkeys(wanted, quality) if callable(quality) else {}
    functions = {name: value[0] if isinstance(value, tuple) else value for name, value in functions.items()}
    for given in weights:
        name, equals, path = given.partition("=")
        if not equals or name not in wanted:
            raise ValueError(f"`reward_weights` {given!r}: write NAME=PATH with a name out of {', '.join(wanted)}")
        files[name] = path
    scores = {}
    for name in wanted:
        of = functions.get(name)
        scores[name] = load_quality(of if callable(of) else name, device=device, weights=files.get(name), bf16=bf16,
                                    prompts=prompts, size=size, name=name)
    return scores, wanted


def rate(name: str, score: Score, images: Tensor, prompts: Sequence[str], *, cast: bool = True) -> Tensor:
    """score(images [B, 3, H, W], prompts) of the quality `name`: float32 [B], all finite.

    ValueError, one line, where it raises or gives something else: what is NaN must not reach the weights. With `cast`
    False the numbers stay of the type that the score gives.
    """
    try:
        values = score(images, list(prompts))
    except Exception as error:  # the user's function may raise anything
        raise ValueError(f"reward {name}: fails on {len(images)} images: {described(error)}") from error
    if not isinstance(values, Tensor) or values.shape != (len(images),):
        what = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"reward {name}: must give a tensor [{len(images)}] for as many images, gave {what}")
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        which = f"{len(bad)} of {len(images)} images, the first of the prompt {prompts[bad[0]][:80]!r}"
        raise ValueError(f"reward {name}: gives {values[bad[0]].item()}, not a finite number, for {which}")
    return values.float() if cast else values
