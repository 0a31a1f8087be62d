"""Trained models on disk: in the layout they came in, or as an adapter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speedrl.method.schedules import parse_steps
from speedrl.method.steps import step_choices
from speedrl.models.generator import Generator
from speedrl.models.loading import load_generator, save_generator, save_sampler
from speedrl.models.lora import add_lora, save_lora
from speedrl.models.sources import recorded_source, resolve_source, resolve_text_encoder
from speedrl.run.checkpoints import holds_model, holds_run, newest, read_record, read_tensors, stored
from speedrl.system.errors import one_line
from speedrl.system.files import damage


def save_trained(
    out: Path, generator: Generator, learned: Mapping[str, Tensor], table: Tensor | None, settings: Mapping[str, Any]
) -> Path:
    """Saves what was learned, by name, to OUT/model, or of an adapter to OUT/adapter; returns the folder.

    `generator` is as it was trained, with its adapter if there is one. The sampler's tensors go with it: `table`, that
    of the search, and the step policy, whose names in `learned` start with "steps.".
    """
    with torch.no_grad():
        own = dict(generator.transformer.named_parameters())
        for name, value in learned.items():
            if not name.startswith("steps."):
                own[name].copy_(value)
    sampler = {name: value for name, value in learned.items() if name.startswith("steps.")}
    if sampler:
        sampler["steps.choices"] = step_choices(*parse_steps(settings["steps"]))
    if table is not None:
        sampler["search"] = table
    scheduler = generator.scheduler | sampled_as(generator, settings)
    if settings["lora"] is not None:
        encoder = (settings["loading"] or {}).get("text_encoder")
        beside = {} if encoder is None else {"text_encoder": resolve_text_encoder(encoder)}
        save_lora(generator.transformer, out / "adapter", base=resolve_source(settings["model"]),
                  scheduler=scheduler | beside)
        save_sampler(sampler, out / "adapter")
        return out / "adapter"
    save_generator(generator._replace(scheduler=scheduler, sampler=sampler), out / "model")
    return out / "model"


def export(
    checkpoint: str | Path, *, out: str | Path, raw: bool = False, merge: bool = False, model: str | None = None
) -> Path:
    """Makes a model of a checkpoint, sharded or not: saves what `train` would have saved had it ended there, to OUT.

    It takes the weights' moving average where there is one, or with `raw` the weights. `checkpoint` is its folder, or a
    run's, for its newest that is whole; `model` the base that it was trained from, by default the one that it records.
    With `merge` an adapter is merged into the base, and OUT/model is a whole model. Returns the folder
    of the model or adapter. ValueError for a damaged one, and where OUT holds a model or another run; FileNotFoundError
    where the base is gone.
    """
    folder = Path(checkpoint)
    if (folder / "checkpoints").is_dir():
        folder = newest(folder)[0] or folder
    others = holds_run(Path(out)) and not folder.resolve().is_relative_to(Path(out).resolve())
    if holds_model(Path(out)) or others:
        raise ValueError(f"{out} holds {'another run' if others else 'a model'}, which stays: give another --out")
    if not (folder / "state.json").is_file():
        raise FileNotFoundError(f"{checkpoint} is not a checkpoint: give one, like RUN/checkpoints/000010")
    if wrong := damage(folder):
        raise ValueError(f"checkpoint {folder} is damaged: {wrong}")
    try:
        record = read_record(folder)
        settings = dict(record["settings"])
        if str(settings["steps"]).startswith("auto"):
            earlier = "was trained with --steps auto by an earlier version, which this one does not read"
            raise ValueError(f"it {earlier}: train it anew with --steps 1-16")
        if merge and settings["lora"] is None:
            raise ValueError("--merge is for an adapter, and the run trained whole weights: leave it out")
        settings["model"] = str(model or recorded_source(settings["model"], where=f"the checkpoint {folder}"))
        generator = load_generator(settings["model"], **(settings["loading"] or {}))
        table = record.get("search", record.get("tuning"))
        if settings["lora"] is not None:
            alpha, targets = settings["lora_alpha"], settings["lora_targets"]
            add_lora(generator.transformer, rank=settings["lora"], alpha=alpha, targets=targets)
        held = stored(folder)
        kind = "average." if not raw and any(name.startswith("average.") for name in held) else "transformer."
        wanted = {name: torch.empty(value.size) for name, value in held.items() if name.startswith(kind)}
        read_tensors(folder, wanted)
        learned = {name.removeprefix(kind): value for name, value in wanted.items()}
        saved = save_trained(Path(out), generator, learned, None if table is None else torch.tensor(table), settings)
        if merge:
            save_generator(load_generator(saved), Path(out) / "model")
        return Path(out) / "model" if merge else saved
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors, torch and json have many
        raise ValueError(f"the checkpoint {folder} cannot be exported: {one_line(error)}") from error


def lasting_sources(model: str | Path, loading: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings `model` and `loading` so that they hold from every working directory and later."""
    kept = dict(loading or {})
    if kept.get("text_encoder") is not None:
        kept["text_encoder"] = resolve_text_encoder(kept["text_encoder"])
    return {"model": resolve_source(model), "loading": kept or None}


def sampled_as(generator: Generator, settings: Mapping[str, Any]) -> dict[str, Any]:
    """How a trained model is sampled from here on: as it was trained."""
    heat = settings["temperature"]
    return {"num_inference_steps": parse_steps(settings["steps"])[1], "guidance_scale": settings["guidance"],
            "temperature": generator.temperature if heat is None else heat,
            "masking_schedule": settings["schedule"] or generator.schedule,
            "reveal_order": settings["order"] or generator.order,
            "remask_share": settings.get("remask", settings.get("revise", generator.remask)),
            "negative_prompt": generator.negative, "micro_conds": generator.micro_conds}
