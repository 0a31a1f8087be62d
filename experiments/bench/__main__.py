"""How fast it is: `python -m experiments.bench` measures, as ratios in one run, and `just docs` shows it.

The machine's ceilings are measured and printed first, in every run. Parts that are in the results already are kept;
`--again` measures them anew, `--only NAME` that part alone. Nothing else should run on the machine meanwhile.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Option

from experiments.bench.ceilings import ceilings
from experiments.bench.measure import machine, table
from experiments.bench.page import PARTS, RESULTS
from speedrl.cli import in_one_line
from speedrl.system.files import write_json
from speedrl.system.platform import quiet_allocator


def main(
    *,
    only: Annotated[list[str], Option(help=f"A part: {', '.join(PARTS)}. [default: all]", show_default=False)] = (),
    again: Annotated[bool, Option(help="Measure parts anew that are in the results.")] = False,
    small: Annotated[bool, Option(help="Sizes that show that the script works, and nothing about speed.")] = False,
    out: Annotated[
        Path | None, Option(help="Folder of the results. [default: experiments/results/bench; small: runs/bench-small]")
    ] = None,
    device: Annotated[str, Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure speed against the machine's ceilings, diffusers' pipeline and a plain iteration."""
    if unknown := set(only) - set(PARTS):
        raise typer.BadParameter(f"there is no part {', '.join(sorted(unknown))}: choose {', '.join(PARTS)}")
    out = out or (Path("runs/bench-small") if small else RESULTS)
    console, on = Console(), machine(device)
    quiet_allocator()
    best = ceilings(device=device, small=small)
    console.print(", ".join(f"{name} {value:.3g}" for name, value in best.items()), highlight=False)
    for name in only or PARTS:
        path = out / f"{name}.json"
        if path.exists() and not again and not only:
            console.print(f"{name}: in {path} already")
            continue
        console.rule(name)
        rows = PARTS[name](best, device=device, small=small, out=out)
        write_json(path, {"machine": on, "ceilings": best, "rows": rows})
        console.print(table(rows), highlight=False, soft_wrap=True)
    console.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(in_one_line(main))
