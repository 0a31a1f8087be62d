"""Many trainings: each in a folder of its own, resumable, one after another or several at a time."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from speedrl.evaluation.measuring import evaluate
from speedrl.method.steps import step_choices
from speedrl.run.checkpoints import to_jsonable
from speedrl.system.errors import one_line
from speedrl.system.files import write_atomically, write_json
from speedrl.training import train

DEFAULTS = dict(train.__kwdefaults__ or {})


def run_folder(out: Path, own: dict, seed: int) -> Path:
    """OUT/runs/OPTIONS/seed-N, named after the options in which a variant differs from the default."""
    name = "_".join(f"{key.replace('_', '-')}-{value}" for key, value in sorted(own.items())) or "default"
    return out / "runs" / re.sub(r"[^\w.+-]", "-", name) / f"seed-{seed}"


def refuse_other(folder: Path, options: dict) -> None:
    """ValueError where a folder holds a run of other options, with those that differ."""
    path = folder / "variant.json"
    if not path.exists():
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), to_jsonable(options)
    differing = [f"`{name}` {before.get(name, 'not given')}, now {now.get(name, 'not given')}"
                 for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if differing:
        raise ValueError(f"{folder} holds a run of other options ({'; '.join(differing)}): give another `out`, or the "
                         "same options")


def trained_once(folder: Path, options: dict, *, device: str) -> Path:
    """The model that `train` made in this folder of these options; trained now, or to the end, if it is not there."""
    if not (folder / "done").exists():
        (folder / "evaluated.json").unlink(missing_ok=True)
        write_json(folder / "variant.json", to_jsonable(options))
        model = train(out=folder / "run", resume=True, device=device, **options)
        write_atomically(folder / "done", lambda partial: partial.write_text(model.name, encoding="utf-8"))
    return folder / "run" / (folder / "done").read_text(encoding="utf-8")


def one_run(folder: Path, options: dict, evaluation: dict, *, device: str) -> list[dict]:
    """Trains and evaluates what a folder is for: the rows of `evaluate`, with a step policy at "auto" steps too.

    The rows of a finished run stay in evaluated.json, with the options of the evaluation that they are of.
    """
    torch.compiler.reset()  # after the networks of a few runs the compiler would give up, and run this one eagerly
    model, how = trained_once(folder, options, device=device), with_auto(evaluation, options)
    path, asked = folder / "evaluated.json", to_jsonable(how)
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if kept.get("evaluation") != asked:
        rows = evaluate([str(model)], out=folder / "eval", device=device, **how)
        kept = {"evaluation": asked, "rows": rows}
        write_json(path, kept)
    return kept["rows"]


def with_auto(evaluation: dict, options: dict) -> dict:
    """The options of `evaluate` for a run of `train`: where it learned its number of steps, at "auto" steps too."""
    counts = step_choices(options.get("steps", DEFAULTS["steps"]))
    return evaluation | {"steps": (*evaluation["steps"], *["auto"] * (len(counts) > 1))}


def run_all(
    runs: Mapping[Path, dict], *, evaluation: dict, devices: Sequence[str], jobs: int, console: Console
) -> dict[Path, list[dict] | str]:
    """The rows of every run, or in one line why it failed. KeyboardInterrupt with what to do, once all have stopped."""
    if jobs > 1:
        return side_by_side(runs, evaluation=evaluation, devices=devices, jobs=jobs, console=console)
    began = time.time()
    outcome: dict[Path, list[dict] | str] = {}
    for number, (folder, options) in enumerate(runs.items()):
        left = (time.time() - began) / max(number, 1) * (len(runs) - number)
        about = f", about {left / 60:.0f} minutes left" if number else ""
        console.rule(f"{folder.parent.name}, {folder.name}: {number + 1} of {len(runs)}{about}")
        try:
            outcome[folder] = one_run(folder, options, evaluation, device=devices[0])
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped in {folder}; the same command goes on") from None
        except Exception as error:  # whatever stops one variant is no reason to lose the others
            outcome[folder] = one_line(error)
            console.print(f"{folder} failed: {outcome[folder]}", soft_wrap=True)
    return outcome


def side_by_side(
    runs: Mapping[Path, dict], *, evaluation: dict, devices: Sequence[str], jobs: int, console: Console
) -> dict[Path, list[dict] | str]:
    """As `run_all`, `jobs` processes at a time: one that dies takes no other with it."""
    waiting, threads = list(runs), max(1, (os.cpu_count() or 1) // jobs)
    outcome: dict[Path, list[dict] | str] = {}
    running: dict[int, tuple[Path, subprocess.Popen]] = {}  # by place, which decides the device
    length = {folder: options.get("iterations", DEFAULTS["iterations"]) for folder, options in runs.items()}
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}", markup=False), *columns, console=console) as progress:
        task = progress.add_task("iterations", total=sum(length.values()), completed=sum(map(iterations_of, runs)))
        try:
            while waiting or running:
                for place in range(jobs):
                    if place not in running and waiting:
                        folder = waiting.pop(0)
                        device = devices[place % len(devices)]
                        job = {"options": runs[folder], "evaluation": evaluation, "device": device}
                        running[place] = folder, start_process(folder, job, threads=threads)
                for place, (folder, process) in list(running.items()):
                    if process.poll() is not None:
                        outcome[folder] = outcome_of(folder, process.returncode)
                        del running[place]
                        if isinstance(failed := outcome[folder], str):
                            progress.console.print(f"{folder} failed: {failed}", soft_wrap=True)
                progress.update(task, completed=sum(map(iterations_of, runs)),
                                description=f"{len(outcome)} of {len(runs)} runs, iterations")
                time.sleep(0.2)
        except KeyboardInterrupt:  # the processes had it too: their trainings end with a checkpoint
            for _, process in running.values():  # all before any is waited for: a second signal stops at once
                process.send_signal(signal.SIGINT)
            for _, process in running.values():
                process.wait()
            raise KeyboardInterrupt(f"stopped after {len(outcome)} of {len(runs)}; the same command goes on") from None
    return outcome


def iterations_of(folder: Path) -> int:
    """How many iterations a run has done."""
    path = folder / "run" / "metrics.jsonl"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def start_process(folder: Path, job: dict, *, threads: int) -> subprocess.Popen:
    """A Python process that does `one_run` of a folder and leaves outcome.json and log.txt in it."""
    (folder / "outcome.json").unlink(missing_ok=True)
    write_json(folder / "job.json", to_jsonable(job))
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "speedrl.studies.runs", str(folder)]
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)


def outcome_of(folder: Path, status: int) -> list[dict] | str:
    """What a process of `start_process` left: rows, or why there are none."""
    path = folder / "outcome.json"
    if not path.exists():
        return f"its process ended with status {status}, see {folder / 'log.txt'}"
    found = json.loads(path.read_text(encoding="utf-8"))
    return found.get("failed") or found["rows"]


def child(folder: Path) -> None:
    """The other side of `start_process`."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    found: dict[str, Any]
    try:
        found = {"rows": one_run(folder, job["options"], job["evaluation"], device=job["device"])}
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        import traceback

        traceback.print_exc()  # into log.txt
        found = {"failed": one_line(error)}
    write_json(folder / "outcome.json", found)


def metrics_file(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def commands_of(folder: Path, options: dict, evaluation: dict) -> list[str]:
    """The two commands that do by hand what a run did."""
    trained = {"out": folder / "run"} | options | {"compare": False}
    measured = {"model": folder / "run", "out": folder / "eval"} | with_auto(evaluation, options)
    return [command("train", trained), command("eval", measured)]


def command(name: str, options: Mapping[str, Any]) -> str:
    """`speedrl NAME` with these options as flags; None is left out."""
    words = ["speedrl", name]
    for key, value in options.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple) and key == "reward_weights":
            words += [word for one in value for word in (f"--{flag}", str(one))]
        elif value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            words += [f"--{flag}", text]
    return shlex.join(words)


if __name__ == "__main__":
    from speedrl.system.platform import quiet_allocator

    quiet_allocator()
    child(Path(sys.argv[1]))
