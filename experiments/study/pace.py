"""What steps that the policy chooses bring: `python -m experiments.study.pace --model RUN --model RUN ...`.

Runs of `speedrl train --steps auto`, one for each seed of training: their pictures in the steps that they choose beside
those of the same weights in given numbers of steps, from the same noise. A given number of as many calls is a mixture
of two, the best that there is (the concave hull of reward over calls). Prompts are put into quarters by the reward that
they have in the fewest steps: the hard ones should take more.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor
from typer import Option

from speedrl.cli import in_one_line
from speedrl.evaluation.judging import Judge, concepts_in, features, load_judge, recall
from speedrl.evaluation.measuring import prompt_sets
from speedrl.generation import draw, planned
from speedrl.models.checkpoint import Generator, decode, load_generator
from speedrl.pace import SWEEP
from speedrl.rewards.loading import Score, load_quality
from speedrl.studies.intervals import interval
from speedrl.system.files import write_atomically, write_json
from speedrl.system.platform import bf16_autocast

AUTO = "auto"


def measured(
    generator: Generator,
    prompts: list[str],
    steps: int | str,
    *,
    count: int,
    seeds: int,
    bf16: bool | None,
    judge: Judge,
    score: Score,
) -> Tensor:
    """Reward, whether the judge names the concept first, and the steps taken: float32 [3, P, seeds * count]."""
    wanted, found = [prompt for prompt in prompts for _ in range(count)], []
    for seed in range(seeds):
        with bf16_autocast("cpu", enabled=bf16):
            tokens, taken = draw(generator, wanted, steps=steps, seed=seed)
        pictures = decode(generator, tokens)
        hits = recall(judge, features(judge, pictures), [concepts_in(prompt, judge.names) for prompt in wanted])[0]
        found.append(
            torch.stack([score(pictures, wanted).float(), hits.float(), taken.float()]).unflatten(1, (-1, count))
        )
    return torch.cat(found, 2)


def hull(points: dict[int, float]) -> list[int]:
    """The counts on the concave hull of reward over counts, rising, up to the best reward."""
    kept: list[int] = []
    for count in sorted(points):
        slope = lambda a, b: (points[b] - points[a]) / (b - a)  # noqa: E731
        while len(kept) > 1 and slope(kept[-2], kept[-1]) <= slope(kept[-1], count):
            kept.pop()
        kept.append(count)
    best = max(kept, key=points.get)
    return [count for count in kept if count <= best]


def mixture(counts: list[int], calls: float) -> dict[int, float]:
    """The shares of two neighbouring counts whose mean is `calls`; the nearest end outside of them."""
    inside = min(max(calls, counts[0]), counts[-1])
    for low, high in zip(counts, counts[1:], strict=False):
        if low <= inside <= high:
            return {low: (high - inside) / (high - low), high: (inside - low) / (high - low)}
    return {counts[0]: 1.0}


def compared(of: dict[int | str, Tensor]) -> dict[str, float | list[float]]:
    """What one training's measurements [3, P, n] by steps say; steps "auto" are those that it chose."""
    means = {steps: values.mean((1, 2)) for steps, values in of.items()}
    given = {steps: means[steps][0].item() for steps in of if steps != AUTO}
    calls, reward, hits = means[AUTO][2].item(), means[AUTO][0].item(), means[AUTO][1].item()
    share = mixture(hull(given), calls)
    instead = sum(weight * of[steps][:2].mean(2) for steps, weight in share.items())  # [2, P]
    gain = of[AUTO][:2].mean(2) - instead
    ease, took = of[min(given)][0].mean(1), of[AUTO][2].mean(1)
    quarters = [took[part].mean().item() for part in ease.argsort().chunk(4)]
    return {
        "calls": calls, "reward": reward, "judge_r1": hits, "gain": gain[0].mean().item(),
        "gain_error": (gain[0].std() / len(ease) ** 0.5).item(), "gain_r1": gain[1].mean().item(),
        "correlation": torch.corrcoef(torch.stack([ease, took]))[0, 1].item(), "quarters": quarters,
        "steps_of_prompts": took.tolist(), "reward_of_prompts": ease.tolist(),
        "given": {str(steps): [value, means[steps][1].item()] for steps, value in given.items()},
    }  # fmt: skip


def told(values: list[float]) -> str:
    """Mean ± half of its 95 % interval."""
    mean, width = interval(values)
    return f"{mean:.3f}" if width is None else f"{mean:.3f} ± {width:.3f}"


def plot(rows: list[dict], path: Path) -> None:
    """Steps of prompts against their reward in the fewest steps, and how many prompts take how many."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    took = torch.tensor([row["steps_of_prompts"] for row in rows]).mean(0)
    ease = torch.tensor([row["reward_of_prompts"] for row in rows]).mean(0)
    fewest = min(int(steps) for steps in rows[0]["given"])
    left.scatter(ease, took, s=12)
    left.set(xlabel=f"reward in {fewest} steps, mean of a prompt", ylabel="steps that it takes, mean")
    right.hist(took, bins=16)
    right.set(xlabel="steps, mean of a prompt", ylabel="prompts")
    write_atomically(path, lambda to: figure.savefig(to, format="png", dpi=120))


def report(rows: list[dict], sets: list[str]) -> str:
    """The tables in Markdown, means over trainings and their 95 % intervals."""
    each = lambda which, name: [row[name] for row in rows if row["prompts"] == which]  # noqa: E731
    lines = ["| | calls | reward | R@1 | reward over given steps | R@1 over them | correlation of steps and ease |",
             "|---|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    for which in sets:
        names = ("calls", "reward", "judge_r1", "gain", "gain_r1", "correlation")
        lines.append(f"| {which} | " + " | ".join(told(each(which, name)) for name in names) + " |")
    lines += ["", "| given steps | " + " | ".join(f"reward, {w} | R@1, {w}" for w in sets) + " |",
              "|--:|" + "--:|" * 2 * len(sets)]  # fmt: skip
    for steps in rows[0]["given"]:
        cells = [told([given[steps][i] for given in each(which, "given")]) for which in sets for i in (0, 1)]
        lines.append(f"| {steps} | " + " | ".join(cells) + " |")
    lines += ["", "| prompts, by reward in the fewest steps | hardest quarter | second | third | easiest |",
              "|---|--:|--:|--:|--:|"]  # fmt: skip
    for which in sets:
        quarters = zip(*each(which, "quarters"), strict=True)
        lines.append(f"| steps, {which} | " + " | ".join(told(list(values)) for values in quarters) + " |")
    return "\n".join(lines) + "\n"


def main(
    model: Annotated[list[str], Option(help="A run of train --steps auto, one for each seed of training.")],
    out: Annotated[Path, Option(help="Folder of the results.")] = Path("runs/pace"),
    beyond: Annotated[int, Option(help="Given steps past those that reveal.")] = 4,
    some: Annotated[int, Option(help="Prompts of each set.")] = 60,
    count: Annotated[int, Option(help="Pictures of each prompt and seed.")] = 4,
    seeds: Annotated[int, Option(help="Sampling seeds.")] = 4,
    bf16: Annotated[bool | None, Option(help="Products in bfloat16. [default: where that is fast]")] = None,
) -> None:
    judge, score, rows = load_judge(), load_quality("embedded"), []
    sets = {which: lines[:some] for which, lines in prompt_sets(None, None).items()}
    for run in model:
        generator = load_generator(run)
        fewest, sweeps = planned(generator, AUTO)
        torch.compiler.reset()
        generator.transformer.compile_blocks()
        every = [AUTO, *range(fewest, fewest + min(beyond, SWEEP * sweeps) + 1)]
        for which, prompts in sets.items():
            how = {"count": count, "seeds": seeds, "bf16": bf16, "judge": judge, "score": score}
            of = {steps: measured(generator, prompts, steps, **how) for steps in track(every, f"{run}, {which}")}
            rows.append({"model": run, "prompts": which, **compared(of)})
            write_json(out / "pace.json", rows)
    text = report(rows, list(sets))
    write_atomically(out / "pace.md", lambda to: to.write_text(text, encoding="utf-8"))
    for which in sets:
        plot([row for row in rows if row["prompts"] == which], out / f"pace-{which}.png")
    Console().print(text, soft_wrap=True)
    typer.echo(f"wrote pace.md, pace.json and pictures in {out}")


if __name__ == "__main__":
    typer.run(in_one_line(main))
