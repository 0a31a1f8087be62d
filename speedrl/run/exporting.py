"""Trained models on disk: in the layout they came in, or as an adapter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speedrl.method.schedules import parse_steps
from speedrl.method.steps import step_choices
from speedrl.models.checkpoint import Generator, load_generator, save_generator
from speedrl.models.lora import add_lora, merge_lora, save_lora
from speedrl.run.checkpoints import newest, read_record, read_tensors, stored
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
    sampler = {name: value.detach().cpu() for name, value in learned.items() if name.startswith("steps.")}
    if sampler:
        sampler["steps.choices"] = step_choices(*parse_steps(settings["steps"]))
    if table is not None:
        sampler["search"] = table
    how = sampled_as(generator, settings)
    if settings["lora"] is not None:
        kept = (settings["loading"] or {}).items()
        beside = {name: value for name, value in kept if name in ("text_encoder", "size")}
        if "text_encoder" in beside:
            beside["text_encoder"] = lasting(beside["text_encoder"])
        scheduler = generator.scheduler | how | beside
        save_lora(generator.transformer, out / "adapter", base=lasting(settings["model"]), scheduler=scheduler)
        return out / "adapter"
    trained = generator._replace(scheduler=generator.scheduler | how, sampler=sampler)
    save_generator(trained, out / "model")
    return out / "model"


def export(checkpoint: str | Path, *, out: str | Path, raw: bool = False) -> Path:
    """Makes a model of a checkpoint, sharded or not: saves what `train` would have saved had it ended there, to OUT.

    It takes the weights' moving average where there is one, or with `raw` the weights. `checkpoint` is its folder, or a
    run's, for its newest that is whole. Returns the folder of the model or adapter. ValueError for a damaged one.
    """
    folder = Path(checkpoint)
    if (folder / "checkpoints").is_dir():
        folder = newest(folder)[0] or folder
    if not (folder / "state.json").is_file():
        raise FileNotFoundError(f"{checkpoint} is no checkpoint: give one, like RUN/checkpoints/000010")
    if wrong := damage(folder):
        raise ValueError(f"checkpoint {folder} is damaged: {wrong}")
    try:
        record = read_record(folder)
        settings, table = record["settings"], record.get("search")
        generator = load_generator(settings["model"], **(settings["loading"] or {}))
        if settings["lora"] is not None:
            alpha, targets = settings["lora_alpha"], settings["lora_targets"]
            add_lora(generator.transformer, rank=settings["lora"], alpha=alpha, targets=targets)
        held = stored(folder)
        kind = "average." if not raw and any(name.startswith("average.") for name in held) else "transformer."
        wanted = {name: torch.empty(value.size) for name, value in held.items() if name.startswith(kind)}
        read_tensors(folder, wanted)
        learned = {name.removeprefix(kind): value for name, value in wanted.items()}
        return save_trained(Path(out), generator, learned, None if table is None else torch.tensor(table), settings)
    except Exception as error:  # safetensors, torch and json have many
        raise ValueError(f"the checkpoint {folder} cannot be exported: {one_line(error)}") from error


def sampled_as(generator: Generator, settings: Mapping[str, Any]) -> dict[str, Any]:
    """How a trained model is sampled from here on: as it was trained."""
    heat = settings["temperature"]
    return {"num_inference_steps": parse_steps(settings["steps"])[1], "guidance_scale": settings["guidance"],
            "temperature": generator.temperature if heat is None else heat,
            "masking_schedule": settings["schedule"] or generator.schedule,
            "reveal_order": settings["order"] or generator.order,
            "remask_share": settings["remask"], "negative_prompt": generator.negative,
            "micro_conds": generator.micro_conds}  # fmt: skip


def lasting(source: str | Path) -> str:
    """A folder's whole path, which holds from every working directory; a hub id or "embedded" as it is."""
    return str(Path(source).resolve() if Path(source).exists() else source)
