"""What a training's settings must be, each by itself and beside the others."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from speedrl.method.divergences import count_weights
from speedrl.method.remasking import check_share
from speedrl.method.sampling import ORDERS
from speedrl.method.schedules import StepRange, mask_ratio
from speedrl.models.checkpoint import adapter_of
from speedrl.pace import divided
from speedrl.rewards.loading import Score, differentiable, parse_quality
from speedrl.run.trackers import TRACKERS

FIRM = 0.02  # a weight of the divergence that held early credit; .0125 did not


def check(settings: dict, bounds: StepRange) -> None:
    """ValueError for settings that cannot work together."""
    check_numbers(settings)
    parse_quality(settings["quality"])
    for name in ("iterations", "groups", "micro_batch", "updates", "save_every", "keep_checkpoints", "max_skipped"):
        if settings[name] < 1:
            raise ValueError(f"{name.replace('_', '-')} must be at least 1, got {settings[name]}")
    if settings["group_size"] < 2:
        raise ValueError("group-size must be at least 2: advantages compare the samples of one prompt")
    if settings["lr"] <= 0:
        raise ValueError(f"lr must be positive, got {settings['lr']}")
    if settings["kl"] not in ("ce", "reverse", "k1", "k2", "k3", "none"):
        raise ValueError(f"unknown divergence {settings['kl']!r}: choose ce, reverse, k1, k2, k3 or none")
    if settings["likelihood"] not in ("token", "sequence", "exact"):
        raise ValueError(f"unknown likelihood {settings['likelihood']!r}: choose token, sequence or exact")
    if settings["credit"] not in (None, "token", "step", "rollout"):
        raise ValueError(f"unknown credit {settings['credit']!r}: choose token, step or rollout")
    if settings["credit"] in ("token", "step") and settings["likelihood"] != "token":
        raise ValueError("tokens and steps have their own credit with the token likelihood only: give --credit rollout")
    if not 0 <= settings["gae_lambda"] <= 1:
        raise ValueError(f"gae-lambda must be 0 to 1, got {settings['gae_lambda']}")
    if settings["order"] not in (None, *ORDERS):
        raise ValueError(f"unknown reveal order {settings['order']!r}: choose confidence, random or halton")
    if settings["schedule"] is not None:
        mask_ratio(torch.zeros(()), kind=settings["schedule"])
    if not 0 <= settings["percentile"] <= 100:
        raise ValueError(f"percentile must be 0 to 100, got {settings['percentile']}")
    if settings["lora"] is not None and adapter_of(settings["model"]):
        raise ValueError(f"{settings['model']} is an adapter already: train it with --merge, and go on from that model")
    if settings["lora"] is None and (settings["merge"] or settings["lora_alpha"] or settings["lora_targets"]):
        raise ValueError("merge, lora-alpha and lora-targets are about an adapter: give its rank by --lora")
    if not 0 <= settings["ema"] < 1:
        raise ValueError(f"ema is a decay from 0 (off) to below 1, like 0.99, got {settings['ema']}")
    if settings["offload"] and settings["parallel"] != "fsdp":
        raise ValueError("offload goes with --parallel fsdp")
    for name in settings["trackers"]:
        if name not in TRACKERS:
            raise ValueError(f"unknown tracker {name!r}: choose {' or '.join(TRACKERS)}")
    if bounds.chosen and not settings["revise"]:
        raise ValueError("a policy that chooses its steps revises in those that it adds: give --revise above 0")
    if settings["trained"] is not None and not 1 <= settings["trained"] <= fewest(bounds):
        raise ValueError(f"trained must be 1 to the least number of steps, {fewest(bounds)}, got {settings['trained']}")


def fewest(bounds: StepRange) -> int:
    """The least number of steps that reveal."""
    return divided(bounds.most)[0] if bounds.chosen else bounds.least


def doubtful(settings: Mapping[str, Any], bounds: StepRange) -> list[str]:
    """A line about each setting that does nothing beside the others, or harm."""
    alike, found = settings["shared_steps"] or settings["credit"] != "rollout", []
    if bounds.drawn and alike and settings["steps_reward"] and settings["quality_gate"] is None:
        needed = "--no-shared-steps and --credit rollout, or --steps auto"
        found += [f"pictures are compared at equal step counts, so the speed reward cancels: it needs {needed}"]
    if bounds.chosen and not settings["steps_reward"]:
        said = "say by --steps-reward what saving them is worth"
        found += [f"steps cost nothing, so all that help at all are taken: {said}"]
    if settings["early_credit"] and settings["credit"] != "token":
        found += [f"early-credit goes with the credit of tokens: beside that of a {settings['credit']} it does nothing"]
    elif settings["early_credit"] and held(settings, bounds) < FIRM:
        firm = "--kl-weight 0.2 --kl-falloff 0"
        found += [f"early-credit can ruin a training that is hardly held to the base in few steps: give {firm}"]
    return found


def held(settings: Mapping[str, Any], bounds: StepRange) -> float:
    """What the divergence weighs at the fewest steps."""
    weight = count_weights(torch.tensor(fewest(bounds)), falloff=settings["kl_falloff"]).item()
    return 0.0 if settings["kl"] == "none" else settings["kl_weight"] * weight


def kind_of_credit(
    credit: str | None, likelihood: str, scores: Mapping[str, Score], shares: Mapping[str, float], *, device: str
) -> str:
    """The credit that is asked for, or the best that can be had. ValueError for one of tokens without a gradient."""
    if credit in ("step", "rollout") or likelihood != "token":
        return credit or "rollout"
    flat = [name for name, score in scores.items() if shares[name] and not differentiable(score, device=device)]
    if credit == "token" and flat:
        raise ValueError(f"the reward {flat[0]} has no gradient at the pictures, so tokens have none: --credit step")
    return "step" if flat else "token"


def check_numbers(settings: Mapping[str, Any]) -> None:
    """ValueError for a number that is out of its range, naming the option."""
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{option} must be a finite number, got {value}")
        if name in ("clip_range", "clip_grad", "eps", "tune_rate", "pace_lr") and value <= 0:
            raise ValueError(f"{option} must be positive, got {value}")
        positive = ("kl_weight", "temperature", "quality_clip", "warmup", "early_credit", "kl_falloff")
        if name in positive and value is not None and value < 0:
            raise ValueError(f"{option} must not be negative, got {value}")
    check_share(settings["revise"])
    if not -(2**63) <= settings["seed"] < 2**63:
        raise ValueError(f"seed must fit in 64 bits, got {settings['seed']}")
    if settings["groups"] * settings["group_size"] >= 2**31:
        raise ValueError(f"groups {settings['groups']} times group-size {settings['group_size']} are too many pictures")
