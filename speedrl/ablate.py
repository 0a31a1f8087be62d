"""Ablations: train variants that differ in one thing, evaluate each, and put them into one table."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from speedrl.evaluate import evaluate, markdown, metrics_of, over_seeds, table
from speedrl.files import write_atomically, write_json
from speedrl.state import checkpoints
from speedrl.train import train


def variants(name: str) -> dict[str, dict]:
    """The variants of a named ablation, each with the options of `train` that it sets. ValueError for no such name.

    speed-reward: step counts drawn from 2 to 16, with the speed reward and without. As the policy does not choose
    them, the speed reward's expected gradient is 0 (see `speed_reward`): it can only add noise to the advantages.
    """
    match name:
        case "speed-reward":
            return {
                "without speed reward": {"steps": "2-16", "steps_reward": 0.0},
                "with speed reward": {"steps": "2-16", "steps_reward": 0.5},
            }
    raise ValueError(f"unknown ablation {name!r}: choose speed-reward")


def ablate(
    name: str = "speed-reward",
    *,
    out: str | Path = "runs/ablate",
    seeds: Sequence[int] = (0,),
    model: str = "embedded",
    evaluation: dict | None = None,
    **options,
) -> list[dict]:
    """Trains every variant of an ablation from every seed and evaluates it: one row each for variant and setting.

    `options` go to `train` for all variants, but for what the ablation itself sets (ValueError); `evaluation` are
    options of `evaluate`. The model they start from is evaluated too, as the variant "start". A run lies in
    OUT/VARIANT/seed-N: a finished one is kept, an interrupted one goes on, one of other options is refused
    (ValueError). A variant that fails is reported, and the others go on.

    A row is as in `evaluate`, with the variant as its model, each metric's mean over training seeds, and as its spread
    their standard deviation (n - 1; None for one seed), not that over sampling seeds. Writes OUT/ablation.json and
    OUT/ablation.md and prints the table. ValueError where no variant ran.
    """
    chosen, out, console = variants(name), Path(out), Console()
    for variant, own in chosen.items():
        if own.keys() & options.keys():
            raise ValueError(f"the ablation {name} sets {', '.join(sorted(own.keys() & options.keys()))} itself")
        for seed in seeds:
            refuse_other(run_folder(out, variant, seed), options | own | {"model": model, "seed": seed})
    if not seeds:
        raise ValueError("there is no seed to train from: give at least one")

    measured, failed = {"start": [evaluate([model], out=out / "start", **(evaluation or {}))]}, {}
    for variant, own in chosen.items():
        for seed in seeds:
            folder = run_folder(out, variant, seed)
            try:
                console.rule(f"{variant}, seed {seed}")
                trained = trained_once(folder, options | own | {"model": model, "seed": seed})
                rows = evaluate([str(trained)], out=folder / "eval", **(evaluation or {}))
                measured.setdefault(variant, []).append(rows)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"stopped at {variant}, seed {seed}; the same command goes on") from None
            except Exception as error:  # whatever stops one variant is no reason to lose the others
                failed[f"{variant}, seed {seed}"] = " ".join(str(error).split()) or type(error).__name__
                console.print(f"{variant}, seed {seed} failed: {failed[f'{variant}, seed {seed}']}")
    rows = [row for variant, runs in measured.items() for row in over_runs(variant, runs)]
    write_json(out / "ablation.json", {"ablation": name, "seeds": list(seeds), "failed": failed, "rows": rows})
    text = f"# {name}\n\n{markdown(rows)}" + "".join(f"\nFailed: {run}: {why}\n" for run, why in failed.items())
    write_atomically(out / "ablation.md", lambda partial: partial.write_text(text))
    console.print(table(rows, width=console.width))
    console.print(f"wrote ablation.json and ablation.md in {out}")
    if len(measured) == 1:
        raise ValueError(f"no variant of {name} ran: {'; '.join(f'{run}: {why}' for run, why in failed.items())}")
    return rows


def run_folder(out: Path, variant: str, seed: int) -> Path:
    return out / variant.replace(" ", "-") / f"seed-{seed}"


def refuse_other(folder: Path, options: dict) -> None:
    """ValueError where a folder holds a run of other options."""
    path = folder / "variant.json"
    if path.exists() and json.loads(path.read_text()) != json.loads(json.dumps(options, default=str)):
        raise ValueError(f"{folder} holds a run of other options: give another folder, or the same options")


def trained_once(folder: Path, options: dict) -> Path:
    """The model that `train` made in this folder of these options; trained now, or to the end, if it is not there."""
    if (folder / "run" / "model").exists():
        return folder / "run" / "model"
    write_json(folder / "variant.json", json.loads(json.dumps(options, default=str)))
    begun = bool(checkpoints(folder / "run"))
    if not begun:
        (folder / "run" / "metrics.jsonl").unlink(missing_ok=True)  # of a run stopped before its first checkpoint
    return train(out=folder / "run", resume=begun, **options)


def over_runs(variant: str, runs: list[list[dict]]) -> list[dict]:
    """The rows of several trainings of one variant as one list: means, and spreads over the trainings."""
    rows = []
    for same in zip(*runs, strict=True):
        row = {key: value for key, value in same[0].items() if key not in ("weights", "settings")} | {"model": variant}
        metrics = metrics_of(list(same))
        row |= over_seeds([{name: one.get(name) for name in metrics} for one in same])
        row["seconds_per_image"] = statistics.fmean(one["seconds_per_image"] for one in same)
        rows.append(row | {"runs": len(same)})
    return rows
