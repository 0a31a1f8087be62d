"""Trained models on disk: in the layout they came in, or as an adapter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speedrl.method.schedules import step_range
from speedrl.models.checkpoint import Generator, load_generator, paced, parameters, save_generator, save_pace
from speedrl.models.lora import add_lora, merge_lora, save_lora
from speedrl.run.checkpoints import newest, read_record, read_tensors, stored
from speedrl.system.errors import one_line
from speedrl.system.files import damage


def save_trained(
    out: Path, generator: Generator, learned: Mapping[str, Tensor], table: Tensor | None, settings: Mapping[str, Any]
) -> Path:  # fmt: skip
    """Saves what was learned, by name, to OUT/model, or to OUT/adapter and with `merge` to both; returns the folder.
    `table` is the tuning.

    `generator` is as it was trained, with its adapter and its pace if there are any.
    """
    with torch.no_grad():
        own = parameters(generator)
        for name, value in learned.items():
            own[name].copy_(value)
    how = sampled_as(generator, settings) | ({} if table is None else {"tuning": table.tolist()})
    if settings["lora"] is not None:
        kept = (settings["loading"] or {}).items()
        beside = {name: value for name, value in kept if name in ("text_encoder", "size")}
        if "text_encoder" in beside:
            beside["text_encoder"] = lasting(beside["text_encoder"])
        scheduler = generator.scheduler | how | beside
        save_lora(generator.transformer, out / "adapter", base=lasting(settings["model"]), scheduler=scheduler)
        save_pace(generator.pace, out / "adapter/pace")
        if not settings["merge"]:
            return out / "adapter"
        merge_lora(generator.transformer)
    save_generator(generator._replace(scheduler=generator.scheduler | how), out / "model")
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
        settings, table = record["settings"], record.get("tuning")
        source, bounds = load_generator(settings["model"], **(settings["loading"] or {})), step_range(settings["steps"])
        generator = paced(source, bounds)
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
    return {"num_inference_steps": step_range(settings["steps"]).most, "guidance_scale": settings["guidance"],
            "temperature": generator.temperature if heat is None else heat,
            "masking_schedule": settings["schedule"] or generator.schedule,
            "reveal_order": settings["order"] or generator.order,
            "revised_share": settings.get("revise", generator.revise), "negative_prompt": generator.negative,
            "micro_conds": generator.micro_conds}  # fmt: skip


def lasting(source: str | Path) -> str:
    """A folder's whole path, which holds from every working directory; a hub id or "embedded" as it is."""
    return str(Path(source).resolve() if Path(source).exists() else source)
