"""What a training's settings must be, each by itself and beside the others. A setting that cannot act is refused."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from speedrl.method.advantages import SCALES
from speedrl.method.divergences import KINDS
from speedrl.method.sampling import ORDERS
from speedrl.method.schedules import mask_ratio
from speedrl.models.loading import check_guidance
from speedrl.models.sources import find, is_adapter
from speedrl.run.trackers import TRACKERS

CLIP_RANGE = 0.2  # as `train` has it where none is given
LIKELIHOODS = ("exact", "token", "sequence")
POSITIVE = ("lr", "clip_range", "clip_grad", "steps_lr")
NOT_NEGATIVE = ("kl_weight", "temperature", "quality_clip", "warmup", "steps_reward", "reward_gradient", "search",
                "iterations")
AT_LEAST_ONE = ("groups", "micro_batch", "updates", "save_every", "keep_checkpoints", "max_skipped", "train_steps")


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def check(settings: Mapping[str, Any], least: int, most: int) -> None:
    """ValueError for settings that are out of range, that cannot work together, or that would have no effect."""
    check_numbers(settings)
    choices = {"kl": KINDS, "likelihood": LIKELIHOODS, "order": (None, *ORDERS), "advantage_std": SCALES}
    for name, known in choices.items():
        if settings[name] not in known:
            raise ValueError(f"{option(name)} must be {', '.join(filter(None, known))}, got {settings[name]!r}")
    for name in settings["trackers"]:
        if name not in TRACKERS:
            raise ValueError(f"--tracker must be {' or '.join(TRACKERS)}, got {name!r}")
    if settings["group_size"] < 2:
        raise ValueError(f"--group-size must be at least 2 images of a prompt, got {settings['group_size']}")
    if (size := settings["groups"] * settings["group_size"]) >= 2**31:
        raise ValueError(f"--groups times --group-size is too many images: {size}")
    if settings["schedule"] is not None:
        mask_ratio(torch.zeros(()), kind=settings["schedule"])
    if not 0 <= settings["percentile"] <= 100:
        raise ValueError(f"--percentile must be 0 to 100, got {settings['percentile']}")
    if not 0 <= settings["ema"] < 1:
        raise ValueError(f"--ema is a decay from 0 (off) to below 1, like 0.99, got {settings['ema']}")
    for name in ("guidance", "reference_guidance"):
        if settings[name] is not None:
            check_guidance(settings[name], option(name))
    if settings["remask"] is not None and not 0 <= settings["remask"] <= 1:
        raise ValueError(f"--remask is a share of the tokens, 0 to 1, got {settings['remask']}")
    if settings["lora"] is not None and is_adapter(find(settings["model"])):
        raise ValueError(f"{settings['model']} is an adapter already: export it with --merge, and train that model")
    for wrong, why in idle(settings, least, most):
        if wrong:
            raise ValueError(why)


def idle(settings: Mapping[str, Any], least: int, most: int) -> list[tuple[Any, str]]:
    """Whether a setting cannot act beside the others, and what to say of it."""
    has: Callable[[str], Any] = settings.get
    without_reward, held = has("quality") == "none", has("kl") != "none" and has("kl_weight")
    return [
        (not has("iterations") and (without_reward or not has("search")),
         "--iterations 0 searches the sampler and does not train: it needs a --quality and --search above 0"),
        (has("steps_reward") and least == most,
         f"--steps-reward {has('steps_reward')} cannot act with --steps {most}, where every image costs the same: "
         f"give a range, like --steps 1-{max(2, most)}, or --steps-reward 0"),
        (has("groups") < 2 and least < most,
         "--groups must be at least 2 with a range of --steps: tokens are compared with those of other prompts at "
         "equal step count"),
        (has("quality_gate") is not None and not has("steps_reward"),
         "--quality-gate says which images earn the speed reward: give a range of --steps and "
         "--steps-reward above 0 with it"),
        (without_reward and has("steps_reward"),
         "--steps-reward is in units of the quality, and --quality none has none: give --steps-reward 0"),
        (without_reward and has("reward_gradient"), "--reward-gradient needs a reward: --quality none has none"),
        (without_reward and not held,
         "--quality none trains by the divergence alone: give --kl-weight above 0 and another --kl than none"),
        (has("clip_range") != CLIP_RANGE and has("updates") == 1,
         f"--clip-range {has('clip_range'):g} has no effect with one update of each rollout, whose ratio is 1: give "
         "--updates 2 or more, or leave it out"),
        (has("kl") == "k1" and has("kl_weight"),
         "--kl k1 has an expected gradient of 0, so it cannot hold the policy: choose ce, reverse, k2 or k3"),
        (has("train_steps") is not None and has("train_steps") >= most > 1,
         f"--train-steps {has('train_steps')} has no effect with at most {most} steps: give fewer, or leave it out"),
        (has("train_steps") is not None and most == 1, "--train-steps has no effect with --steps 1: leave it out"),
        (has("remask") and most < 6,
         f"--remask acts from 6 steps on, and --steps has at most {most}: give more, or leave it out"),
        (has("reward_gradient") and has("updates") > 1,
         "--reward-gradient has no importance ratio, so nothing would hold a second update: give --updates 1"),
        (has("offload") and has("parallel") != "fsdp", "--offload keeps sharded weights on the processor: it goes with "
         "--parallel fsdp"),
        (has("lora") is None and (has("lora_alpha") or has("lora_targets")),
         "lora_alpha and lora_targets are about an adapter: give its rank by --lora"),
    ]


def check_numbers(settings: Mapping[str, Any]) -> None:
    """ValueError for a number that is out of its range, naming the option."""
    for name, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value) and (name, value) != ("min_quality", -math.inf):
            raise ValueError(f"{option(name)} must be a finite number, got {value}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name in POSITIVE and value <= 0:
            raise ValueError(f"{option(name)} must be above 0, got {value:g}")
        if name in NOT_NEGATIVE and value < 0:
            raise ValueError(f"{option(name)} must not be negative, got {value:g}")
        if name in AT_LEAST_ONE and value < 1:
            raise ValueError(f"{option(name)} must be at least 1, got {value}")
    if not -(2**63) <= settings["seed"] < 2**63:
        raise ValueError(f"--seed must fit in 64 bits, got {settings['seed']}")


def check_sampler(settings: Mapping[str, Any], *, most: int, length: int) -> None:
    """ValueError for what cannot be sampled or scored; `settings` with the model's own order and so on filled in.

    The exact likelihood does not exist where positions are chosen by confidence without noise.
    """
    if most > length:
        raise ValueError(f"--steps {most} is more than the {length} tokens of an image")
    deterministic = settings["order"] == "confidence" and settings["temperature"] == 0 and most > 1
    if settings["likelihood"] == "exact" and deterministic:
        raise ValueError(
            "--likelihood exact does not exist at --temperature 0, where the reveal order is deterministic: give a "
            "--temperature above 0, --order random, or --likelihood token"
        )
    if settings["quality"] == "none" and settings["guidance"] == settings["reference_guidance"]:
        raise ValueError(
            "--quality none trains by the divergence from the reference alone, which is 0 at equal guidance: give "
            "another --reference-guidance or --guidance"
        )
