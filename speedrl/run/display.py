"""What the terminal shows while a model trains."""

import time
from collections import deque

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class Display:
    """A live table of the last iterations over a progress bar; plain lines where the output is no terminal."""

    def __init__(self, *, total: int, first: int = 0, rows: int = 12, console: Console | None = None):
        self.console = console or Console()
        self.recent: deque[dict] = deque(maxlen=rows)
        self.said: set[str] = set()
        self.progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), console=self.console,
        )  # fmt: skip
        self.task = self.progress.add_task("training", total=total, completed=first)
        terminal = self.console.is_terminal
        self.live = Live(self.render(), console=self.console, refresh_per_second=2) if terminal else None

    def __enter__(self) -> "Display":
        self.began = time.time()
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def render(self) -> Group:
        table = Table(box=None, header_style="bold")
        for name in self.recent[-1] if self.recent else ("iteration",):
            table.add_column(name.replace("_", " "), justify="right")
        for row in self.recent:
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
        return Group(table, self.progress)

    def begin(self, first: int) -> None:
        """Sets how many iterations were done before."""
        self.progress.update(self.task, completed=first)

    def warn(self, text: str) -> None:
        """Says something once, above the table."""
        if text not in self.said:
            self.said.add(text)
            self.console.print(f"warning: {text}", soft_wrap=True, highlight=False, markup=False)

    def show(self, row: dict) -> None:
        self.recent.append(row)
        self.progress.advance(self.task)
        if self.live:
            self.live.update(self.render())
        else:
            shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            self.console.print(shown, soft_wrap=True, highlight=False, markup=False)
