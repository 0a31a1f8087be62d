"""Trained models on disk: in the layout they came in, or as an adapter."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from speedrl.method.sampler import Sampler
from speedrl.method.steps import step_choices
from speedrl.models.generator import Generator
from speedrl.models.loading import load_generator, save_generator, save_sampler, scheduler_of
from speedrl.models.lora import add_lora, save_lora
from speedrl.models.sources import recorded_source
from speedrl.run.checkpoints import holds_model, holds_run, newest, read_record, read_tensors, stored
from speedrl.system.errors import one_line
from speedrl.system.files import damage
from speedrl.system.options import Opt


def save_trained(
    out: Path, generator: Generator, learned: Mapping[str, Tensor], sampler: Sampler, settings: Mapping[str, Any]
) -> Path:
    """Saves what was learned, by name, to OUT/model, or of an adapter to OUT/adapter; returns the folder.

    `generator` is as it was trained, with its adapter if there is one; `settings` are those of a run's record. Names in
    `learned` that start with "steps." are the step policy's, which goes with the sampler.
    """
    with torch.no_grad():
        own = dict(generator.transformer.named_parameters())
        for name, value in learned.items():
            if not name.startswith("steps."):
                own[name].copy_(value)
    steps = {name.removeprefix("steps."): value for name, value in learned.items() if name.startswith("steps.")}
    choices = step_choices(settings["steps"])
    trained = generator._replace(sampler=sampler, steps=int(choices.max()),
                                 step_policy=steps and steps | {"choices": choices})
    if settings["lora"] is None:
        save_generator(trained, out / "model")
        return out / "model"
    encoder = settings["text_encoder"]
    beside = {} if encoder is None else {"text_encoder": encoder}
    save_lora(generator.transformer, out / "adapter", base=settings["model"], scheduler=scheduler_of(trained) | beside)
    save_sampler(trained, out / "adapter")
    return out / "adapter"


def whole_generator(load: Callable[[], Generator], settings: Mapping[str, Any]) -> Generator:
    """A generator to put trained weights into: loaded anew, with its adapter."""
    generator = load()
    if settings["lora"] is not None:
        add_lora(generator.transformer, rank=settings["lora"], alpha=settings["lora_alpha"],
                 targets=settings["lora_targets"])
    return generator


def export(
    checkpoint: Annotated[str | Path, Opt("A checkpoint's folder, or a run's for its newest.", cli=str,
                                          positional=True)],
    *,
    out: Annotated[str | Path, Opt("Folder that gets model/ or adapter/, as a finished run's has.", cli=Path)],
    raw: Annotated[bool, Opt("The weights themselves where their moving average was kept.")] = False,
    merge: Annotated[bool, Opt("Of an adapter: the model with the adapter merged.")] = False,
    model: Annotated[str | None, Opt(
        "The model that was trained, if it is no longer where the checkpoint says.")] = None,
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
        raise ValueError(f"{out} holds {'another run' if others else 'a model'}, which stays: give another `out`")
    if not (folder / "state.json").is_file():
        raise FileNotFoundError(f"{checkpoint} is not a checkpoint: give one, like RUN/checkpoints/000010")
    if wrong := damage(folder):
        raise ValueError(f"checkpoint {folder} is damaged: {wrong}")
    try:
        record = read_record(folder)
        settings = dict(record["settings"])
        if merge and settings["lora"] is None:
            raise ValueError("`merge` is for an adapter, and the run trained whole weights: leave it out")
        settings["model"] = str(model or recorded_source(settings["model"], where=f"the checkpoint {folder}"))
        names = {"text_encoder": "text_encoder", "size": "size", "negative": "negative_prompt",
                 "micro_conds": "micro_conds"}
        given = {name: settings[option] for name, option in names.items()}
        generator = whole_generator(lambda: load_generator(settings["model"], **given), settings)
        sampler = generator.sampler.replace(**{name: settings[name] for name in generator.sampler.settings()})
        if record.get("search") is not None:
            sampler = sampler.replace(scalars=torch.tensor(record["search"]))
        held = stored(folder)
        kind = "average." if not raw and any(name.startswith("average.") for name in held) else "transformer."
        wanted = {name: torch.empty(value.size) for name, value in held.items() if name.startswith(kind)}
        read_tensors(folder, wanted)
        learned = {name.removeprefix(kind): value for name, value in wanted.items()}
        saved = save_trained(Path(out), generator, learned, sampler, settings)
        if merge:
            save_generator(load_generator(saved), Path(out) / "model")
        return Path(out) / "model" if merge else saved
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors, torch and json have many
        raise ValueError(f"the checkpoint {folder} cannot be exported: {one_line(error)}") from error
