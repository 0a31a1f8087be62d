"""Trackers beside metrics.jsonl: TensorBoard and Weights & Biases. One that fails never stops a training."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from speedrl.system.errors import one_line
from speedrl.system.files import write_atomically

Track = Callable[[Mapping[str, Any]], None]  # takes the row of an iteration


def tensorboard(out: Path, settings: Mapping[str, Any], *, resume: bool) -> Track:
    """Writes to OUT/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"))
    writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()))

    def track(row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "iteration" and value is not None:
                writer.add_scalar(name, value, row["iteration"])
        writer.flush()

    return track


def wandb(out: Path, settings: Mapping[str, Any], *, resume: bool) -> Track:
    """Logs to Weights & Biases, as its own environment variables say (WANDB_PROJECT, WANDB_MODE=offline).

    The run's id is in OUT/wandb_id.txt: with `resume` its rows go on, else it is a new one, as W&B drops the rows of a
    second training under the id of the first.
    """
    import wandb as service

    file = out / "wandb_id.txt"
    goes_on = resume and file.exists()
    name = file.read_text(encoding="utf-8").strip() if goes_on else secrets.token_hex(8)
    run = service.init(dir=str(out), config=dict(settings), id=name, resume="allow" if goes_on else "never")
    write_atomically(file, lambda partial: partial.write_text(name + "\n", encoding="utf-8"))
    return lambda row: run.log(dict(row), step=row["iteration"])


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb}


def open_trackers(
    names: Sequence[str], out: Path, settings: Mapping[str, Any], *, resume: bool = False
) -> Callable[..., list[str]]:
    """A function that gives an iteration's row to every tracker, and returns a line about each that fails.

    A tracker that has failed is left alone from then on. `names` are out of TRACKERS; with `resume` the run goes on.
    """
    waiting = list(names)
    opened: dict[str, Track] = {}

    def track(row: Mapping[str, Any]) -> list[str]:
        problems = []
        for name in [*waiting, *opened]:
            try:
                if name in waiting:
                    waiting.remove(name)
                    opened[name] = TRACKERS[name](out, settings, resume=resume)
                opened[name](row)
            except Exception as error:  # missing, offline, full: none is worth a training
                opened.pop(name, None)
                advice = (
                    f'pip install -e ".[{name}]" in a clone' if isinstance(error, ImportError) else "training goes on"
                )
                problems.append(f"the tracker {name} fails and is left out ({one_line(error)}): {advice}")
        return problems

    return track
