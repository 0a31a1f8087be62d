"""What the terminal shows while a model trains."""

import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from speedrl.system.output import Output

# the columns that matter first; others follow in the order of the row, as many as fit
FIRST = ("iteration", "reward", "quality", "steps", "kl", "clip_fraction", "images_per_second", "grad_norm")
SHORT = {"iteration": "it", "clip_fraction": "clipped", "images_per_second": "img/s", "grad_norm": "|grad|"}
TRENDS = ("reward", "quality", "steps")  # shown as moving means over the whole run
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 9  # characters of a column and its gap


def number(value: object) -> str:
    """A value in at most seven characters; "–" for None, what is not known."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1000 or value == 0 else f"{value:.0e}"


def columns_that_fit(names: Sequence[str], width: int) -> list[str]:
    """The most important columns that fit into `width` characters, in the order of FIRST."""
    ordered = [name for name in FIRST if name in names] + [name for name in names if name not in FIRST]
    return ordered[: max(1, width // WIDTH)]


def moving_means(values: Sequence[float], count: int) -> list[float]:
    """The means of `count` stretches of about equal length, or the values themselves if they are fewer."""
    count = min(count, len(values))
    bounds = [round(len(values) * k / count) for k in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in zip(bounds, bounds[1:], strict=False)]


def sparkline(values: Sequence[float], *, width: int, bars: str = BARS) -> str:
    """Values as a line of bars between their least and most, as moving means where they are more than `width`."""
    means = moving_means(values, width)
    low, high = min(means), max(means)
    if high == low:
        return bars[0] * len(means)
    return "".join(bars[min(len(bars) - 1, int((value - low) / (high - low) * len(bars)))] for value in means)


def time_left(seconds: float) -> str:
    """A time to wait in words."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


class Display:
    """Trends, a live table of the last iterations and a progress bar; plain lines where the output is no terminal.

    Of a stage that takes long there is a bar, or a line every `every` seconds. An output that goes away, as a closed
    pipe or terminal, raises nothing.
    """

    def __init__(self, *, total: int, rows: int = 8, quiet: bool = False, every: float = 20):
        stream: Any = Output(sys.stdout) if sys.stdout else None
        self.console = Console(file=stream, quiet=quiet, markup=False, highlight=False)
        self.recent: deque[Mapping[str, object]] = deque(maxlen=rows)
        self.history: dict[str, list[float]] = {name: [] for name in TRENDS}
        self.said: set[str] = set()
        self.progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=self.console,
        )
        self.task = self.progress.add_task("training", total=total)
        terminal = self.console.is_terminal and not self.console.is_dumb_terminal
        self.live = Live(self.render(), console=self.console, refresh_per_second=2) if terminal else None
        self.every, self.ended = every, threading.Event()
        self.text, self.began, self.told, self.done, self.parts = "", 0.0, 0.0, 0, 0  # of the stage, "" for none

    def __enter__(self) -> "Display":
        if self.live:
            self.live.start()
        else:
            threading.Thread(target=self.tell_progress, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        if self.live:
            self.live.update(self.render())
            self.live.stop()

    def begin(self, first: int) -> None:
        """Sets how many iterations were done before."""
        self.progress.update(self.task, completed=first)

    def stage(self, text: str, total: int = 0) -> None:
        """Says what happens before the next iteration is done, in `total` parts, or 0 where they are not known."""
        self.text, self.done, self.parts = text, 0, total
        self.began = self.told = time.monotonic()
        for task in self.progress.task_ids[1:]:
            self.progress.remove_task(task)
        self.progress.update(self.task, description="training" if total else text)
        if total:
            self.progress.add_task(text, total=total)
        if self.live:
            self.live.update(self.render())
        else:
            self.console.print(text, soft_wrap=True)

    def advance(self) -> None:
        """A part of the stage is done."""
        self.done += 1
        for task in self.progress.task_ids[1:]:
            self.progress.advance(task)

    def tell_progress(self) -> None:
        """Prints a line on the stage every so often, until the end."""
        while not self.ended.wait(self.every / 20):
            text, now, done, parts = self.text, time.monotonic(), self.done, self.parts
            if text and now - self.told >= self.every:
                self.told, taken = now, now - self.began
                how = f"{time_left(taken)} so far"
                if 0 < done <= parts:
                    how = f"{done} of {parts}, about {time_left(taken / done * (parts - done))} left"
                self.console.print(f"{text}: {how}", soft_wrap=True)

    def render(self) -> Group:
        """The trends, the table and the bar."""
        names = columns_that_fit(list(self.recent[-1]) if self.recent else ["iteration"], self.console.width)
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for name in names:
            table.add_column(SHORT.get(name, name.replace("_", " ")), justify="right", no_wrap=True, min_width=6)
        for row in self.recent:
            table.add_row(*(number(row.get(name, "")) for name in names))
        return Group(*self.trends(), table, self.progress)

    def trends(self) -> list[Text]:
        """A line for each of TRENDS: where it began, its sparkline, where it is."""
        bars = BARS if self.console.encoding.lower().startswith("utf") else "_.-=+*%#"
        lines = []
        for name, values in self.history.items():
            if len(values) > 1 and (name != "steps" or min(values) < max(values)):
                means = moving_means(values, 5)
                line = sparkline(values, width=max(8, min(40, self.console.width - 34)), bars=bars)
                lines.append(Text(f"{name:<10}{number(means[0]):>8} {line} {number(means[-1])}", no_wrap=True))
        return lines

    def warn(self, text: str) -> None:
        """Says something once, above the table."""
        if text not in self.said:
            self.said.add(text)
            self.console.print(f"warning: {text}", soft_wrap=True)

    def show(self, row: Mapping[str, object]) -> None:
        """An iteration's metrics."""
        self.recent.append(row)
        for name, values in self.history.items():
            if isinstance(value := row.get(name), float):
                values.append(value)
        self.text = ""
        for task in self.progress.task_ids[1:]:
            self.progress.remove_task(task)
        self.progress.update(self.task, advance=1, description="training")
        if self.live:
            self.live.update(self.render())
        else:
            shown = "  ".join(f"{name} {number(value)}" for name, value in row.items())
            self.console.print(shown, soft_wrap=True)
