"""Rewards: qualities and their mixture, speed, and their combination."""

import functools
import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from speedrl.rewards.scorers import Score, clip_score, hpsv2_score, imagereward_score

EMBEDDED = Path(__file__).parents[1] / "models" / "embedded" / "reward"
PUBLISHED = {  # a short name and what open_clip calls it
    "clip": ("ViT-L-14", "openai"),
    "clip-l": ("ViT-L-14", "openai"),
    "clip-h": ("ViT-H-14", "laion2b_s32b_b79k"),
}


def import_function(name: str) -> Callable:
    """The function of "module:function"; modules in the working directory are found too.

    Raises what the import raises, AttributeError without such a function, TypeError for something else.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    found = getattr(importlib.import_module(module), function)
    if not callable(found):
        raise TypeError(f"{name} is no function")
    return found


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def parse_quality(text: str) -> dict[str, float]:
    """Reads "hpsv2=1,imagereward=0.5,clip" as weights by name, 1 where none is given. ValueError otherwise."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, weight = part.strip().rpartition("=")
        name, weight = (name, weight) if equals else (weight, "1")
        try:
            value = float(weight)
        except ValueError:
            raise ValueError(f"quality {part.strip()!r}: {weight!r} is no number; write NAME=WEIGHT") from None
        if not name or name.endswith("=") or name in weights or not math.isfinite(value):
            raise ValueError(f"quality {text!r}: write each name once, like hpsv2=1,imagereward=0.5")
        weights[name] = value
    if not any(weights.values()):
        raise ValueError(f"quality {text!r}: every weight is 0")
    return weights


def loader(name: str, *, device: torch.device | str, weights: str | None, bf16: bool | None) -> Callable[[], Score]:
    """What loads the quality `name` of `load_quality`. ValueError where there is none of that name."""
    options = {"device": device, "bf16": bf16}
    if name in ("hpsv2", "imagereward"):
        return functools.partial({"hpsv2": hpsv2_score, "imagereward": imagereward_score}[name], weights=weights,
                                 **options)  # fmt: skip
    if name in PUBLISHED:
        architecture, published = PUBLISHED[name]
        return functools.partial(clip_score, architecture, weights=weights or published, **options)
    if name.startswith("clip:") and name != "clip:":
        architecture, _, published = name.removeprefix("clip:").partition(":")
        if not (weights or published):
            raise ValueError(f"reward {name}: say which weights, clip:ARCHITECTURE:WEIGHTS, or give a file")
        return functools.partial(clip_score, architecture, weights=weights or published, **options)
    if weights is not None:
        raise ValueError(f"reward {name}: it takes no weights, only hpsv2, imagereward and clip do")
    folder = EMBEDDED if name == "embedded" else Path(name)
    if (folder / "open_clip_config.json").is_file():
        return functools.partial(clip_score, f"local-dir:{folder}", **options)
    if name == "embedded":
        raise ValueError("reward embedded: it is not in this installation: rebuild it, see experiments/")
    if all(name.partition(":")) and not folder.exists():
        return functools.partial(import_function, name)
    raise ValueError(
        f"there is no reward {name!r}: give embedded, hpsv2, imagereward, clip, clip:ARCHITECTURE:WEIGHTS, "
        "a folder with open_clip_config.json or MODULE:FUNCTION"
    )


def with_pictures_gradient(score: Score) -> Score:
    """The same score, with a gradient where the pictures have one: no other is ever asked for."""

    @functools.wraps(score)
    def scored(pictures: Tensor, prompts: list[str]) -> Tensor:
        with torch.set_grad_enabled(pictures.requires_grad and torch.is_grad_enabled()):
            return score(pictures, prompts)

    return scored


def load_quality(
    name: str = "embedded", *, device: torch.device | str = "cpu", weights: str | None = None, bf16: bool | None = None
) -> Score:
    """A quality reward: score(images float [B, 3, H, W] in [0, 1], B prompts) -> float32 [B].

    `name` is one of
      embedded                    the small CLIP that comes with the embedded model
      hpsv2, imagereward          the published models of human preference
      clip, clip-l, clip-h        CLIP ViT-L-14 (OpenAI's) and ViT-H-14 (LAION's)
      clip:ARCHITECTURE:WEIGHTS   any of open_clip's, with the name of published weights
      FOLDER                      a folder in open_clip's layout, with open_clip_config.json, weights and tokenizer
      MODULE:FUNCTION             your own function with score's signature
    `weights` is a file in place of the published one; `bf16` by default where it is fast. The reward is tried on two
    pictures here. ValueError, one line, where there is no such reward, it cannot be loaded, raises, or gives something
    else than B finite numbers in float32.
    """
    load = loader(name, device=device, weights=weights, bf16=bf16)
    try:
        score = with_pictures_gradient(load())
    except Exception as error:  # open_clip, safetensors and the user's module raise many kinds
        raise ValueError(f"reward {name}: cannot be loaded: {first_line(error)}") from error
    pictures = torch.linspace(0, 1, 2 * 3 * 64 * 64, device=device).view(2, 3, 64, 64)
    try:
        tried = score(pictures, ["a red apple", "two dogs"])
    except Exception as error:  # the user's function may raise anything
        raise ValueError(f"reward {name}: fails on two pictures: {first_line(error)}") from error
    if not isinstance(tried, Tensor) or tried.shape != (2,) or tried.dtype != torch.float32:
        what = f"{tried.dtype} {list(tried.shape)}" if isinstance(tried, Tensor) else type(tried).__name__
        raise ValueError(f"reward {name}: must give a float32 tensor [2] for two pictures, gave {what}")
    if not tried.isfinite().all():
        raise ValueError(f"reward {name}: gives {tried.tolist()} for two pictures: not finite")
    return score


def differentiable(score: Score, *, device: torch.device | str = "cpu") -> bool:
    """Whether a score has a gradient at its pictures: it is tried on two."""
    pictures = torch.linspace(0, 1, 2 * 3 * 64 * 64, device=device).view(2, 3, 64, 64).requires_grad_()
    try:
        (slope,) = torch.autograd.grad(score(pictures, ["a red apple", "two dogs"]).sum(), pictures)
    except Exception:  # a user's function may leave torch, and says so in its own way
        return False
    return bool(slope.isfinite().all() and slope.any())


def load_qualities(
    text: str, *, device: torch.device | str = "cpu", weights: Sequence[str] = (), bf16: bool | None = None
) -> tuple[dict[str, Score], dict[str, float]]:
    """The scores of "hpsv2=1,imagereward=0.5" and their weights, both by name. `weights` are files, "NAME=PATH" each.

    A quality of weight 0 is scored and logged but not rewarded: it can tell whether the others are being gamed.
    """
    if text == "none":
        return {}, {}
    wanted, files = parse_quality(text), {}
    for given in weights:
        name, equals, path = given.partition("=")
        if not equals or name not in wanted:
            raise ValueError(f"reward weights {given!r}: write NAME=PATH with a name out of {', '.join(wanted)}")
        files[name] = path
    return {name: load_quality(name, device=device, weights=files.get(name), bf16=bf16) for name in wanted}, wanted


def rate(name: str, score: Score, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    """score(pictures [B, 3, H, W], prompts) of the quality `name`: float32 [B], all finite.

    ValueError, one line, where it raises or gives something else: what is NaN must not reach the weights.
    """
    try:
        values = score(pictures, list(prompts))
    except Exception as error:  # the user's function may raise anything
        raise ValueError(f"reward {name}: fails on {len(pictures)} pictures: {first_line(error)}") from error
    if not isinstance(values, Tensor) or values.shape != (len(pictures),):
        what = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"reward {name}: must give a tensor [{len(pictures)}] for as many pictures, gave {what}")
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        which = f"{len(bad)} of {len(pictures)} pictures, the first of {prompts[bad[0]][:80]!r}"
        raise ValueError(f"reward {name}: gives {values[bad[0]].item()} for {which}; the last checkpoint stands")
    return values.float()
