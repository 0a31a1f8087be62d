"""The generated parts of the pages of results, from files of `speedrl ablate NAME` in experiments/results/ablations.

The ablation MAIN fills docs/results.md, the others fill docs/ablations.md. Any subset of
variants and steps will do.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from speedrl.evaluation.measuring import columns_of, grid
from speedrl.evaluation.reports import BEFORE, SEARCHED
from speedrl.studies.ablations import AGAIN, COMPARED, all_ablations, differences_of, floors, is_result
from speedrl.studies.intervals import caution
from speedrl.studies.runs import command

RESULTS = Path(__file__).parent / "results" / "ablations"
MAIN, SPEED, START = "method", "speed-reward", "start"
FIGURE, FRONTIER = "quality_against_nfe.svg", "speed_reward_front.svg"
KEPT = ("model", "steps", "NFE")  # columns that every table has
HIDDEN = ("prompts", "s/image")  # and none: there is a table for each set of prompts, and times need an idle machine
MISSING = """\
**No measurement of this version is here yet.** This makes it, in many hours on two cores:

```sh
just results {name}
```
"""


def read_results(folder: Path = RESULTS) -> dict[str, dict]:
    """The ablations of a folder by name."""
    return {path.stem: named(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))}


def named(found: dict) -> dict:
    """An ablation with its rows called BEFORE, SEARCHED or by variant, and with its "baseline".

    The model that all trainings start from is the base. With `--beside embedded` that is the base, and they start from
    it with its sampler searched; another single model beside them is the searched one.
    """
    models = list(dict.fromkeys(row["model"] for row in found["rows"]))
    variants = all_ablations().get(found["ablation"])
    beside = [model for model in models if model not in (START, SEARCHED) and variants and model not in variants]
    names = {START: BEFORE} | ({beside[0]: SEARCHED} if len(beside) == 1 else {})
    if "embedded" in beside:
        names = {START: SEARCHED, "embedded": BEFORE}
    rows = [row | {"model": names.get(row["model"], row["model"])} for row in found["rows"]]
    baseline = next((model for model in models if model not in (START, SEARCHED, *beside)), None)
    return found | {"rows": rows, "baseline": baseline}


def result_pages(found: Mapping[str, dict]) -> dict[str, str]:
    """What stands between the marks of the pages of results, by path."""
    made = {"docs/results.md": MISSING.format(name=MAIN), "docs/ablations.md": ablation_sections(found)}
    if MAIN in found:
        made["docs/results.md"] = section(found[MAIN], f"![Quality against network evaluations]({FIGURE})\n")
    return made


def ablation_sections(found: Mapping[str, dict]) -> str:
    """A section for each ablation but MAIN, and what is not measured."""
    parts, frontier = [], f"![Quality by weight of the speed reward, and the base]({FRONTIER})\n"
    for name in (name for name in found if name != MAIN):
        parts.append(f"## {name}\n\n{section(found[name], frontier if name == SPEED else '')}")
    missing = [name for name in all_ablations() if name not in found and name != MAIN]
    if missing:
        lines = [[f"`{name}`", "; ".join(filter(AGAIN.__ne__, all_ablations()[name]))] for name in missing]
        parts.append(f"## Not measured\n\n{MISSING.format(name='NAME')}\n{grid(['NAME', 'variants'], lines, left=2)}")
    return "\n".join(parts)


def section(found: dict, figure: str = "") -> str:
    """One ablation: its variants, tables, differences, failures and commands."""
    differences, shown = found["differences"], {row["model"] for row in found["rows"]}
    missing = [variant for variant in all_ablations().get(found["ablation"], {}) if variant not in shown]
    parts = [
        variants_table(found["ablation"], shown), f"Not measured yet: {', '.join(missing)}.\n" if missing else "",
        sizes(found), figure, *tables(found["rows"]),
    ]
    if floors(differences):
        parts += ["Differences of the A/A pair:\n", pair_table(differences)]
    if any(one["variant"] != AGAIN for one in differences):
        parts += ["Differences from the baseline; * marks results:\n", result_table(differences)]
    parts.append("".join(f"- Failed: {run}: `{why}`\n" for run, why in found["failed"].items()))
    # of the runs that differ in their seed alone one, with N for it
    commands = [re.sub(r"(?<=--seed )\d+|(?<=/seed-)\d+", "N", line) for line in found["commands"]]
    if commands:
        words = f"`just results {found['ablation']}` measures it. The commands of its runs, where N is a seed:\n"
        parts.append("\n".join([words, "```sh", *dict.fromkeys(commands), "```", ""]))
    return "\n".join(part for part in parts if part)


def tables(rows: list[dict]) -> list[str]:
    """For each set of prompts its name and a table of its rows by steps; settings alike in all rows are left out."""

    def in_order(row: dict) -> tuple:  # by steps, "auto" last, and of equal steps first the base, then the searched one
        steps = float("inf") if row["steps"] == "auto" else row["steps"]
        return steps, row["model"] != BEFORE, row["model"] != SEARCHED

    parts = []
    for which in dict.fromkeys(row["prompts"] for row in rows):
        own = sorted((row for row in rows if row["prompts"] == which), key=in_order)
        header, lines = columns_of(own, error="interval")
        lines = [[row["model"], *line[1:], str(row["runs"])] for row, line in zip(own, lines, strict=True)]
        columns = zip([*header, "runs"], *lines, strict=True)
        kept = [c for c in columns if c[0] in KEPT or c[0] not in HIDDEN and len(set(c[1:])) > 1]
        header, *lines = zip(*kept, strict=True)
        parts += [f"{which.capitalize()} prompts:\n", grid(header, lines)]
    return parts


def pair_table(differences: list[dict]) -> str:
    """What the A/A pair differs by in every setting, and its largest differences."""
    header, lines = differences_of([found for found in differences if found["variant"] == AGAIN])
    size = floors(differences)
    largest = ["**largest size**", "", *(f"**{size[metric]:.3f}**" for metric in COMPARED if metric in size)]
    return grid(header[1:], [*(line[1:] for line in lines), largest])


def result_table(differences: list[dict]) -> str:
    """How many differences of each variant are results, their settings, and how far to trust them all."""
    floor, others = floors(differences), [found for found in differences if found["variant"] != AGAIN]
    counts = []
    for variant in dict.fromkeys(found["variant"] for found in others):
        own = [is_result(found, floor) for found in others if found["variant"] == variant]
        counts.append(f"- {variant}: {sum(own) or 'none'} of {len(own)}")
    header, lines = differences_of(differences)
    told = [line for line in lines if line[0] != AGAIN and any("*" in cell for cell in line)]
    return "\n".join([*counts, "", *([grid(header, told, left=2)] if told else []), caution(others), ""])


def sizes(found: dict) -> str:
    """How many trainings and images there are, and how all models remask; "" where no command says so."""
    measured = next((line for line in found["commands"] if line.startswith("speedrl eval ")), "")
    runs = sorted({row["runs"] for row in found["rows"] if row["model"] not in (BEFORE, SEARCHED)}) or [0]
    trainings = str(runs[0]) if len(runs) == 1 else f"{runs[0]} to {runs[-1]} (the column runs)"
    words = {"count": "images of each prompt", "seeds": "sampling seeds", "remask": "remasked share of the tokens"}
    known = [f"{text} {value[1]}" for name, text in words.items() if (value := re.search(rf"--{name} (\S+)", measured))]
    return f"Sizes: trainings of each variant {trainings}, {', '.join(known)}.\n" if known else ""


def variants_table(name: str, shown: Collection[str]) -> str:
    """What each variant shown sets; "" for an ablation that this version does not have."""
    lines = [[variant, flags_of(own) + ", from other seeds" * (variant == AGAIN)]
             for variant, own in all_ablations().get(name, {}).items() if variant in shown]
    return grid(["variant", "further options"], lines, left=2) if lines else ""


def flags_of(own: Mapping) -> str:
    """The options of a variant as one types them, or "none"."""
    flags = command("train", own).removeprefix("speedrl train").strip()
    return f"`{flags}`" if flags else "none"
