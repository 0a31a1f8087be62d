"""The state of a training on disk: folders OUT/checkpoints/000010, each whole and sealed by its checksums.

A checkpoint holds tensors in safetensors (what is learned, the optimizer's state, the average of the weights: one file,
or a shard of each rank by torch.distributed.checkpoint), the random states, and the rest in state.json. No pickles.
"""

import errno
import functools
import json
import math
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from speedrl import __version__
from speedrl.method.search import OCTAVES, SPREAD
from speedrl.run.distributed import all_gather_object, barrier, on_all_ranks, rank, world
from speedrl.system.errors import one_line
from speedrl.system.files import append_lines, damage, replace_folder, seal, write_atomically, write_json

LOADING = ("text_encoder", "size", "negative_prompt", "micro_conds", "base")  # of `load_generator`
SHAPING = ("model", "steps", "lora", "lora_targets", "size", "text_encoder")  # settings that tensors' shapes depend on
RANDOM = "random.st"  # not *.safetensors, which are all of the tensors' files


def all_checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, damaged ones included, the newest first."""
    folder = Path(out) / "checkpoints"
    found = [path for path in folder.iterdir() if re.fullmatch(r"\d{6,}", path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def newest(out: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a line about each newer one that is not."""
    complaints: list[str] = []
    for folder in all_checkpoints(out):
        wrong = "is a link or no folder" if folder.is_symlink() or not folder.is_dir() else damage(folder)
        if wrong is None:
            return folder, complaints
        complaints.append(f"checkpoint {folder} is damaged: {wrong}")
    return None, complaints


def tensors(
    learned: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors of a training by name, sharing memory: transformer.NAME, average.NAME and optimizer.KEY.NAME."""
    found = {f"transformer.{name}": p.detach() for name, p in learned.items()}
    found |= {f"average.{name}": value for name, value in average.items()}
    for name, p in learned.items():
        for key, value in optimizer.state.get(p, {}).items():
            found[f"optimizer.{key}.{name}"] = value.view(1) if value.ndim == 0 else value
    return found


def random_states(prompts: torch.Generator, device: torch.device | str) -> dict[str, Tensor]:
    """The states of the prompts' generator and of this rank's generators on the processor and its device."""
    states = {"prompts": prompts.get_state(), f"{rank()}.cpu": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        states[f"{rank()}.cuda"] = torch.cuda.get_rng_state(device)
    return states


def revision() -> str | None:
    """The git commit of this package's source, None where it is installed without."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def save(
    out: Path,
    done: int,
    found: Mapping[str, Tensor],
    random: Mapping[str, Tensor],
    record: Mapping[str, Any],
    *,
    keep: int,
    sharded: bool = False,
) -> None:
    """Writes OUT/checkpoints/DONE and takes away all but the newest `keep`. Every rank calls it, and rank 0 writes.

    `found` as of `tensors`; `random` as of `random_states`, here of one rank; `record` whatever JSON holds. `sharded`:
    each rank writes its own shards, into a folder that all must see. OSError, on every rank, where any could not
    write: what stood there before stands.
    """
    folder = Path(out) / "checkpoints" / f"{done:06d}"
    partial = folder.with_name(f".{folder.name}.partial")
    randoms = {name: value for states in all_gather_object(dict(random)) for name, value in states.items()}

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def shards() -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(dict(found), storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True))

    def rest() -> None:
        if not sharded:
            whole = {name: value.cpu().contiguous() for name, value in found.items()}
            save_file(whole, partial / "tensors.safetensors")
        save_file(randoms, partial / RANDOM)
        about = {"iteration": done, "ranks": world(), "version": __version__, "revision": revision()}
        write_json(partial / "state.json", about | dict(record))
        seal(partial)
        replace_folder(partial, folder)
        for old in (*all_checkpoints(out)[keep:], *folder.parent.glob(".*")):  # and what a killed run left half done
            shutil.rmtree(old, ignore_errors=True)

    try:
        on_all_ranks(prepare if rank() == 0 else None)
        if sharded:
            on_all_ranks(shards)
        on_all_ranks(rest if rank() == 0 else None)
    except Exception as error:  # safetensors and torch have their own for what the system refuses
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{folder} cannot be written ({one_line(error)})") from error


def read_tensors(folder: Path, wanted: dict[str, Tensor]) -> None:
    """Fills tensors, sharded or not, from a checkpoint's, sharded or not, by name and in place."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings(action="ignore"):  # that every rank reads for itself
        dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def stored(folder: Path) -> dict[str, Any]:
    """What a checkpoint's files hold: torch.distributed.checkpoint's metadata by name, with `size` and dtype."""
    return dict(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


def read_record(folder: Path) -> dict[str, Any]:
    """What a checkpoint's state.json holds. ValueError, or another's error, where a part of it is of another kind."""
    record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    counts = [record["iteration"], record["ranks"], *(record.get(name, 0) for name in ("skipped", "skipped_total"))]
    tables: list[tuple[Any, tuple[int, ...]]]
    tables = [(record["search"], (OCTAVES, len(SPREAD)))] if record.get("search") is not None else []
    tables += [(record["gap"], ())] if "gap" in record else []
    tables += [(moments, (3,)) for moments in record.get("moments", {}).values()]
    tables += [(list(row.values()), (len(row),)) for row in record.get("recent", ())]
    if not all(type(count) is int and 0 <= count < 2**63 for count in counts) or any(
        torch.tensor(table, dtype=torch.float64).shape != shape for table, shape in tables
    ):
        raise ValueError("state.json holds a count or a table of another kind")
    if not isinstance(record.get("settings", {}), dict):
        raise ValueError("state.json holds no settings")
    return record


def restore(
    folder: Path,
    learned: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: Mapping[str, Tensor],
    prompts: torch.Generator,
    device: torch.device | str,
    *,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Loads a checkpoint into place and returns its record. ValueError where it is another model's: it names those of
    the run's `settings` that have changed since.

    Shards of any number of ranks are read by any other. Each rank's own random states come back where the number of
    ranks is the same.
    """
    try:
        record = read_record(folder)
        held = stored(folder)
        for entry in held:
            kind, _, name = entry.partition(".")
            key, _, name = name.partition(".")
            if kind == "optimizer" and name in learned:
                p = learned[name]
                # AdamW counts in a number of its own, which is on the parameter's device where AdamW is fused
                shape = torch.zeros((), device=p.device) if key == "step" else torch.zeros_like(p.detach())
                optimizer.state[p][key] = shape
        averaged = any(entry.startswith("average.") for entry in held)
        wanted = tensors(learned, optimizer, average if averaged else {})
        held = {name: value for name, value in held.items() if average or not name.startswith("average.")}
        wrong = wanted.keys() ^ held.keys() or {name for name in wanted if wanted[name].shape != held[name].size}
        if wrong:
            now = changed(record.get("settings", {}), settings, only=SHAPING)
            why = f"it was trained with {'; '.join(now)}: give what it was, or another `out`" if now else ""
            raise ValueError(why or f"{len(wrong)} tensors do not fit, such as {min(wrong)}")
        read_tensors(folder, wanted)
        if not averaged:  # it begins here
            for name, value in average.items():
                value.copy_(learned[name].detach())
        randoms = load_file(folder / RANDOM)
        prompts.set_state(randoms["prompts"])
        if record["ranks"] == world():
            torch.set_rng_state(randoms[f"{rank()}.cpu"])
            if f"{rank()}.cuda" in randoms and torch.device(device).type == "cuda":
                torch.cuda.set_rng_state(randoms[f"{rank()}.cuda"], device)
    except Exception as error:  # safetensors, torch and json have many
        raise ValueError(f"{folder} is another model's or another training's: {one_line(error)}") from error
    barrier()
    return record


def make_folder(out: Path) -> None:
    """Makes a run's folder. OSError, one line, where it cannot be written: now, not after an iteration."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(out))
    except OSError as error:
        raise OSError(f"{out} cannot be written ({one_line(error)}): choose another `out`") from error


def holds_run(out: Path) -> bool:
    """Whether a folder is that of a run, however far it came."""
    return bool(all_checkpoints(out)) or (out / "metrics.jsonl").exists()


def holds_model(out: Path) -> bool:
    """Whether a folder holds what `train` or `export` saved."""
    return any((out / name).is_dir() for name in ("model", "adapter"))


def start(out: Path, *, resume: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from in a run's folder, if any, and lines about damaged ones that are newer.

    ValueError where the folder holds a model or a run that is not resumed, or nothing but damaged checkpoints.
    """
    if not resume and holds_model(out):
        what, use = "a finished run" if holds_run(out) else "a model", f"`speedrl sample PROMPT --model {out}`"
        further = ", go on by `resume` and more `iterations`" if all_checkpoints(out) else ""
        raise ValueError(f"{out} holds {what}: use it by {use}{further}, or give another `out`")
    if not resume and holds_run(out):
        raise ValueError(f"{out} holds a run that has not finished: go on with `resume`, or give another `out`")
    folder, complaints = newest(out) if resume else (None, [])
    if folder is None and complaints:
        raise ValueError(f"{'; '.join(complaints)}; none is whole: start the run anew in another folder")
    return folder, complaints


def drop_metrics(out: Path, done: int) -> None:
    """Takes the lines past iteration `done` out of OUT/metrics.jsonl, and one that was being written when it ended."""
    metrics, kept = out / "metrics.jsonl", []
    for line in (
        metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if metrics.exists() else []
    ):
        try:
            if line.endswith("\n") and json.loads(line)["iteration"] <= done:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    write_atomically(metrics, lambda partial: partial.write_text("".join(kept), encoding="utf-8"))


def append_row(out: Path, row: Mapping[str, Any], unwritten: list[str]) -> str | None:
    """Appends a line to OUT/metrics.jsonl, after those that could not be written; what to say if it cannot be either.

    A number that is not finite is null.
    """
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    unwritten.append(json.dumps(finite) + "\n")
    try:
        append_lines(out / "metrics.jsonl", unwritten)
    except OSError as error:
        return f"metrics.jsonl cannot be written ({one_line(error)}); training goes on, and its lines are kept"
    return None


def to_jsonable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON holds them; a function, or an object that is called, by its name, so that a resumed run has the
    same."""

    def text(value: Any) -> str:
        if isinstance(value, functools.partial):
            return text(value.func)
        if callable(value) and not hasattr(value, "__qualname__"):
            value = type(value)
        name = getattr(value, "__qualname__", None)
        return f"{value.__module__}:{name}" if callable(value) and name else str(value)

    return json.loads(json.dumps(settings, default=text))


def changed(before: Mapping[str, Any], now: Mapping[str, Any], *, only: Collection[str] = ()) -> list[str]:
    """The settings that make a difference to what is learned, and differ: "`lr` 3e-05, now 0.0001". What `loading`
    holds has names of its own; `only` are some."""
    free = ("out", "resume", "iterations", "save_every", "keep_checkpoints", "device", "compile", "micro_batch",
            "checkpointing", "parallel", "offload", "trackers", "max_skipped")
    before, now = ({**dict.fromkeys(LOADING), **given, **(given.get("loading") or {})} for given in (before, now))
    names = [name for name in now if name not in (*free, "loading") and name in before and before[name] != now[name]]

    def told(value: Any) -> str:
        return "not given" if value is None else str(value)

    return [f"`{name}` {told(before[name])}, now {told(now[name])}" for name in names
            if not only or name in only]
