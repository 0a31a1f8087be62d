"""Trackers beside metrics.jsonl: TensorBoard and Weights & Biases. One that fails never stops a training."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from speedrl.system.errors import one_line

Track = Callable[[Mapping[str, Any]], None]  # takes the row of an iteration


def tensorboard(out: Path, settings: Mapping[str, Any]) -> Track:
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


def wandb(out: Path, settings: Mapping[str, Any]) -> Track:
    """Logs to Weights & Biases, as its own environment variables say (WANDB_PROJECT, WANDB_MODE=offline)."""
    import wandb as service

    run = service.init(dir=str(out), config=dict(settings), id=out.resolve().name, resume="allow")
    return lambda row: run.log(dict(row), step=row["iteration"])


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb}


def open_trackers(names: Sequence[str], out: Path, settings: Mapping[str, Any], *, resume: bool = False) -> Callable[..., list[str]]:
    """A function that gives an iteration's row to every tracker, and returns a line about each that fails.

    A tracker that has failed is left alone from then on. `names` are out of TRACKERS.
    """
    waiting, opened = list(names), {}

    def track(row: Mapping[str, Any]) -> list[str]:
        problems = []
        for name in [*waiting, *opened]:
            try:
                if name in waiting:
                    waiting.remove(name)
                    opened[name] = TRACKERS[name](out, settings)
                opened[name](row)
            except Exception as error:  # missing, offline, full: none is worth a training
                opened.pop(name, None)
                advice = f'pip install "speedrl[{name}]"' if isinstance(error, ImportError) else "training goes on"
                problems.append(f"the tracker {name} fails and is left out ({one_line(error)}): {advice}")
        return problems

    return track
