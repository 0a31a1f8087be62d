"""What a training's settings must be, each by itself and beside the others. A setting that cannot act is refused."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from speedrl.method.filters import dropped_groups
from speedrl.method.sampler import Sampler
from speedrl.method.steps import step_choices
from speedrl.models.generator import Generator
from speedrl.models.sources import find, is_adapter, resolve_source, resolve_text_encoder
from speedrl.run.checkpoints import to_jsonable
from speedrl.system.options import check_options


def check_settings(function: Callable, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `train`, with steps_reward filled in. ValueError for one that is out of range, that cannot work
    beside the others, or that would have no effect."""
    settings = dict(settings)
    check_options(function, settings)
    choices = step_choices(settings["steps"])
    if settings["steps_reward"] is None:
        settings["steps_reward"] = 0.0 if len(choices) == 1 or settings["quality"] == "none" else 0.5
    if settings["shared_noise"] is None:
        settings["shared_noise"] = settings["likelihood"] != "exact"
    if (size := settings["groups"] * settings["group_size"]) >= 2**31:
        raise ValueError(f"`groups` times `group_size` is too many images: {size}")
    Sampler().replace(schedule=settings["schedule"])
    if settings["lora"] is not None:
        if isinstance(settings["model"], Generator):
            raise ValueError("`lora` records its base by name: give `model` a folder or a hub id")
        if is_adapter(find(settings["model"])):
            raise ValueError(f"{settings['model']} is an adapter already: export it with `merge`, and train that model")
    given = {name: value for name, value in settings.items()
             if value != inspect.signature(function).parameters[name].default}
    for wrong, why in idle(settings, given, len(choices), int(choices.max())):
        if wrong:
            raise ValueError(why)
    return settings


def idle(
    settings: Mapping[str, Any], given: Mapping[str, Any], counts: int, most: int
) -> list[tuple[Any, str]]:
    """Whether a setting cannot act beside the others, and what to say of it. `given` are those that are no default."""
    has: Callable[[str], Any] = settings.get
    without_reward, fixed = has("quality") == "none", counts == 1
    unheld = not has("kl_weight") and not has("hindsight")
    return [
        (not has("iterations") and (without_reward or not has("search")),
         "`iterations` 0 searches the sampler and does not train: it needs a `quality` and `search` above 0"),
        (has("steps_reward") and fixed,
         f"`steps_reward` {has('steps_reward')} cannot act with `steps` {most}, where every image costs the same: "
         f"give a range, like 1-{max(2, most)}, or `steps_reward` 0"),
        (has("groups") < 2 and not fixed,
         "`groups` must be at least 2 with a range of `steps`"),
        (has("quality_gate") is not None and not has("steps_reward"),
         "`quality_gate` says which images earn the speed reward: give a range of `steps` and `steps_reward` above 0 "
         "with it"),
        (without_reward and has("steps_reward"),
         "`steps_reward` is in units of the quality, and `quality` none has none: give `steps_reward` 0"),
        (without_reward and unheld,
         "`quality` none trains by the reference alone: give `kl_weight` or `hindsight` above 0"),
        (without_reward and "search" in given and has("search"),
         "`search` needs a reward: `quality` none has none"),
        ("kl" in given and not has("kl_weight"), "`kl` has no effect at `kl_weight` 0: leave it out"),
        ("reference_guidance" in given and unheld,
         "`reference_guidance` has no effect at `kl_weight` 0 and `hindsight` 0: leave it out"),
        ("hindsight_share" in given and not has("hindsight"),
         "`hindsight_share` has no effect at `hindsight` 0: leave it out"),
        ("hindsight_share" in given and most == 1,
         "`hindsight_share` has no effect with `steps` 1, where the state knows nothing and the reference of it is the "
         "target: leave it out"),
        ("clip_range" in given and has("updates") == 1,
         f"`clip_range` {has('clip_range'):g} has no effect with one update of each rollout, whose ratio is 1: give "
         "`updates` 2 or more, or leave it out"),
        (has("likelihood") == "sequence" and has("updates") == 1,
         "`likelihood` sequence is the same as token with one update of each rollout, whose ratio is 1: give `updates` "
         "2 or more"),
        ("percentile" in given and has("percentile") and not dropped_groups(has("groups"), has("percentile")),
         f"`percentile` {has('percentile'):g} drops none of {has('groups')} groups: give more `groups`, a larger "
         "`percentile`, or 0"),
        (has("train_steps") is not None and has("train_steps") >= most,
         f"`train_steps` {has('train_steps')} has no effect with at most {most} steps: give fewer, or leave it out"),
        (has("remask") and most < 6,
         f"`remask` acts from 6 steps on, and `steps` has at most {most}: give more, or leave it out"),
        (has("offload") and has("parallel") != "fsdp",
         "`offload` keeps sharded weights on the processor: it goes with `parallel` fsdp"),
        (has("lora") is None and (has("lora_alpha") or has("lora_targets")),
         "`lora_alpha` and `lora_targets` are about an adapter: give its rank by `lora`"),
    ]


def check_sampler(
    settings: Mapping[str, Any], generator: Generator, sampler: Sampler, reference_guidance: float, *, most: int
) -> dict[str, Any]:
    """The settings as a run keeps them, with the model's own filled in. ValueError for what cannot be sampled or
    scored: the exact likelihood does not exist where positions are chosen by confidence without noise."""
    length = generator.grid[0] * generator.grid[1]
    if most > length:
        raise ValueError(f"`steps` {most} is more than the {length} tokens of an image")
    deterministic = sampler.order == "confidence" and sampler.temperature == 0 and most > 1
    if settings["likelihood"] == "exact" and deterministic:
        raise ValueError(
            "`likelihood` exact does not exist at `temperature` 0, where the reveal order is deterministic: give a "
            "`temperature` above 0, `order` random, or `likelihood` token"
        )
    if settings["likelihood"] == "exact" and sampler.shared_noise:
        raise ValueError("`likelihood` exact is that of independent draws: give `shared_noise` False with it")
    alone = settings["quality"] == "none" and not settings["hindsight"]
    if alone and sampler.guidance == reference_guidance:
        raise ValueError(
            "`quality` none trains by the divergence from the reference alone, which is 0 at equal guidance: give "
            "another `reference_guidance` or `guidance`"
        )
    found = dict(settings) | sampler.settings() | {"reference_guidance": reference_guidance}
    # so that they hold from every working directory and later
    own = isinstance(settings["model"], Generator)
    found["model"] = "a Generator" if own else resolve_source(settings["model"])
    if settings["text_encoder"] is not None:
        found["text_encoder"] = resolve_text_encoder(settings["text_encoder"])
    return to_jsonable(found)
