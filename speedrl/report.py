"""What a training run ends with: the trained model beside its base, in pictures and in numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from speedrl.evaluate import judge_if_there, network_calls, one_cell, prompt_sets, table
from speedrl.files import write_json
from speedrl.models.checkpoint import load_generator
from speedrl.reward import load_qualities
from speedrl.sample import contact_sheet, sample, save_png


def report(
    base: str,
    trained: str | Path,
    *,
    out: str | Path,
    prompts: str | Path | None = None,
    quality: str = "embedded",
    reward_weights: Sequence[str] = (),
    some: int = 16,
    count: int = 4,
    seeds: int = 3,
    pictures: int = 10,
    device: str = "cpu",
    loading: Mapping[str, Any] | None = None,
) -> list[dict]:
    """Compares a trained model with its base on the same prompts and noise; returns rows as `evaluate` does.

    The rows: the base at its own steps and guidance; the base at the trained model's steps, at its own guidance and
    without, each at its own and at half of its temperature (what few steps give without training); the trained model
    as it was trained. On the first `some` prompts of each set, `count` pictures of each for each of `seeds` seeds.
    Writes OUT/comparison.json and OUT/before_after.png and prints the table.
    """
    out, trained, console = Path(out), str(trained), Console()
    before, after = load_generator(base, device=device, **(loading or {})), load_generator(trained, device=device)
    sets = {which: lines[:some] for which, lines in prompt_sets(prompts, None).items()}
    judge = judge_if_there(device, console)
    scores, _ = load_qualities(quality, device=device, weights=reward_weights)
    few, heat = after.steps, before.temperature
    settings = [(base, before, before.steps, before.guidance, heat)]
    settings += [(base, before, few, g, t) for g in dict.fromkeys((before.guidance, 1.0)) for t in (heat, heat / 2)]
    settings += [(trained, after, few, after.guidance, after.temperature)]
    rows = []
    for which in sets:
        for model, generator, steps, guidance, temperature in track(settings, f"comparing, {which} prompts"):
            row = {"model": model, "prompts": which, "steps": steps, "guidance": guidance, "temperature": temperature,
                   "network_calls": network_calls(steps, guidance)}  # fmt: skip
            row |= one_cell(
                generator, judge, scores, sets[which], which=which, steps=steps, guidance=guidance,
                temperature=temperature, count=count, seeds=seeds, batch=None, after_seed=lambda: None,
            )  # fmt: skip
            rows.append(row)
            write_json(out / "comparison.json", rows)

    shown = next(iter(sets.values()))[:pictures]
    lines = (("before", before, before.steps), ("before", before, few), ("after", after, few))
    labels = [f"{when}: {steps} steps, {network_calls(steps, g.guidance)} calls" for when, g, steps in lines]
    sheet = [sample(generator, shown, steps=steps).cpu() for _, generator, steps in lines]
    scale = max(1, 96 // sheet[0].shape[-1])
    save_png(contact_sheet(sheet, labels=labels, titles=shown, scale=scale), out / "before_after.png")
    console.print(table(rows, width=console.width))
    console.print(f"wrote {out / 'before_after.png'} and {out / 'comparison.json'}", soft_wrap=True)
    return rows
