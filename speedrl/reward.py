"""Rewards: quality, speed, and their combination."""

import functools
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from speedrl.platform import import_torchvision


def speed_reward(steps: Tensor, *, max_steps: int) -> Tensor:
    """Share of the network calls saved against `max_steps`, 1 - steps / max_steps: int64 [B] -> float32 [B].

    No units: 0 at max_steps, 1 - 1 / max_steps at one step, negative beyond max_steps. Guidance doubles the calls of
    every step and leaves the share unchanged. Where the step count is drawn independently of the policy, this term
    has zero expected gradient: it only shifts the baseline between step counts. It pays for speed where the policy
    chooses the step count. ValueError for max_steps below 1.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    return 1 - steps.float() / max_steps


def combine(quality: Tensor, speed: Tensor, *, steps_reward: float, gate: float | None = None) -> Tensor:
    """quality + steps_reward * speed, [B] and [B] -> [B]; with a gate, speed counts only where quality >= gate.

    `steps_reward` is the quality that saving every network call would be worth; `gate` is in units of the quality.
    """
    bonus = steps_reward * speed
    return quality + (bonus if gate is None else torch.where(quality >= gate, bonus, 0))


def clip_encoders(
    name: str, *, device: torch.device | str = "cpu", weights: str | None = None
) -> tuple[Callable[[Tensor], Tensor], Callable[[list[str]], Tensor]]:
    """open_clip's model `name` ("local-dir:FOLDER" or an architecture with `weights`) as two functions.

    The first takes float [B, 3, H, W] in [0, 1] on any device, crops the square in the middle, resizes it to the
    tower's size where it differs (bicubic, antialiased) and normalises it as the model was trained; the second takes
    B prompts and remembers the features of the latest 16,384. Both return float32 [B, D] of norm 1, without gradient,
    on `device`. Raises what open_clip raises, RuntimeError where no weights are found.
    """
    import_torchvision()
    import open_clip

    model = open_clip.create_model(name, pretrained=weights, device=device, require_pretrained=True)
    model.eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(name)
    about = model.visual.preprocess_cfg
    mean, std = (torch.tensor(about[key], device=device)[:, None, None] for key in ("mean", "std"))
    size = (about["size"],) * 2 if isinstance(about["size"], int) else tuple(about["size"])

    @torch.no_grad()
    def images(pictures: Tensor) -> Tensor:
        pictures = pictures.to(device).float()
        height, width = pictures.shape[2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pictures = pictures[:, :, top : top + side, left : left + side]
        if pictures.shape[2:] != size:
            pictures = F.interpolate(pictures, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        return model.encode_image((pictures - mean) / std, normalize=True).float()

    @functools.lru_cache(maxsize=16_384)
    @torch.no_grad()
    def prompt(text: str) -> Tensor:  # one at a time, so that no other prompt of a batch changes its last digits
        return model.encode_text(tokenizer([text]).to(device), normalize=True)[0].float()

    return images, lambda prompts: torch.stack([prompt(text) for text in prompts])


def clip_score(
    name: str, *, device: torch.device | str = "cpu", weights: str | None = None
) -> Callable[[Tensor, list[str]], Tensor]:
    """The cosine of a picture's and its prompt's features, from -1 to 1, of an open_clip model: see `clip_encoders`."""
    images, texts = clip_encoders(name, device=device, weights=weights)
    return lambda pictures, prompts: (images(pictures) * texts(prompts)).sum(-1)


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


def load_quality(
    name: str = "embedded", *, device: torch.device | str = "cpu", weights: str | None = None
) -> Callable[[Tensor, list[str]], Tensor]:
    """A quality reward: score(images float [B, 3, H, W] in [0, 1], B prompts) -> float32 [B], without gradient.

    `name` is one of
      embedded             the small CLIP that comes with the embedded model
      FOLDER               a folder in open_clip's layout, with open_clip_config.json, weights and tokenizer
      clip:ARCHITECTURE    one of open_clip's architectures; `weights` is a file or the name of published weights
      MODULE:FUNCTION      your own function with score's signature
    All but the last score by the cosine of the features of picture and prompt, from -1 to 1 and without a scale. The
    reward is tried on two pictures here. ValueError, one line, where there is no such reward, it cannot be loaded,
    raises, or gives something else than B finite numbers in float32.
    """
    embedded = Path(__file__).parent / "models" / "embedded" / "reward"
    folder = embedded if name == "embedded" else Path(name)
    if weights is not None and not name.startswith("clip:"):
        raise ValueError(f"reward {name}: weights are for clip:ARCHITECTURE only")
    if (folder / "open_clip_config.json").is_file():
        load = functools.partial(clip_score, f"local-dir:{folder}", device=device)
    elif name == "embedded":
        raise ValueError("reward embedded: it is not in this installation: rebuild it, see experiments/")
    elif name.startswith("clip:") and name != "clip:":
        if weights is None:
            raise ValueError(f"reward {name}: give weights, a file or the name of published ones")
        load = functools.partial(clip_score, name.removeprefix("clip:"), device=device, weights=weights)
    elif all(name.partition(":")) and not folder.exists():
        load = functools.partial(import_function, name)
    else:
        raise ValueError(
            f"there is no reward {name!r}: give embedded, a folder with open_clip_config.json, "
            "clip:ARCHITECTURE or MODULE:FUNCTION"
        )
    try:
        score = torch.no_grad()(load())
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
