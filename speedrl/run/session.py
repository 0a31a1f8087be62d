"""What surrounds a training loop: the run's folder, checkpoints, signals, trackers and the display."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speedrl.run import distributed
from speedrl.run.checkpoints import (
    append_row,
    changed,
    drop_metrics,
    make_folder,
    random_states,
    restore,
    save,
    start,
    tensors,
)
from speedrl.run.display import Display
from speedrl.run.trackers import open_trackers
from speedrl.system.errors import Stopped, interruptible, one_line
from speedrl.system.files import locked
from speedrl.system.options import as_flags

LOCK = ".lock"  # in the run's folder, held while it trains
FLAT = 5  # iterations without any spread of the reward that end a training


class Run:
    """A training run in a folder. Made by `open_run`; every rank has one, and rank 0 writes and speaks."""

    def __init__(
        self, out: Path, settings: Mapping[str, Any], *, checkpoint: Path | None, display: Display,
        track: Callable[[Mapping[str, Any]], list[str]], stopped: Callable[[], int], iterations: int, resumed: bool,
        save_every: int, keep_checkpoints: int, max_skipped: int, sharded: bool,
    ):
        self.out, self.settings, self.checkpoint, self.resumed = out, settings, checkpoint, resumed
        self.display, self.track, self.stopped = display, track, stopped
        self.last, self.save_every, self.keep_checkpoints = iterations, save_every, keep_checkpoints
        self.max_skipped, self.sharded = max_skipped, sharded
        self.first, self.saved, self.inside = 0, 0, False
        self.skipped, self.skipped_total, self.flat = 0, 0, 0
        self.unwritten: list[str] = []

    def restore(
        self,
        learned: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        average: Mapping[str, Tensor],
        random: torch.Generator,
        device: str,
    ) -> dict[str, Any]:
        """Loads the newest whole checkpoint into place, if the run has one; its record, {} for a new run."""
        self.held = (learned, optimizer, average)
        self.random, self.device = random, device
        record: dict[str, Any] = {}
        if self.checkpoint:
            record = restore(self.checkpoint, learned, optimizer, average, random, device, settings=self.settings)
        self.first = self.saved = record.get("iteration", 0)
        self.skipped, self.skipped_total, self.flat = (
            record.get(name, 0) for name in ("skipped", "skipped_total", "flat")
        )
        for line in changed(record.get("settings", {}), self.settings):
            self.warn(f"the run goes on with other settings: {line}")
        if distributed.is_main() and self.resumed:
            drop_metrics(self.out, self.first)
        self.display.begin(self.first)
        return record

    def iterations(self) -> Iterator[int]:
        """The iterations that are left."""
        self.inside = True
        yield from range(self.first, self.last)
        self.inside = False

    def stage(self, text: str, total: int = 0) -> None:
        """Says what takes time before the next iteration is done. `advance` counts its `total` parts, 0 if unknown."""
        self.display.stage(text, total)

    def advance(self) -> None:
        """A part of a stage before the first iteration is done. `Stopped` after a signal: there is nothing to save."""
        self.display.advance()
        if number := self.stopped():
            raise Stopped("stopped before the first iteration; start again with the same command", number)

    def warn(self, text: str) -> None:
        """Says something once."""
        self.display.warn(as_flags(text, {}))

    def log(self, row: Mapping[str, Any]) -> None:
        """An iteration's metrics: to the display, metrics.jsonl and the trackers."""
        self.display.show(dict(row))
        for problem in (append_row(self.out, row, self.unwritten), *self.track(row)) if distributed.is_main() else ():
            if problem:
                self.warn(problem)

    def update_was_finite(self, finite: bool, *, iteration: int) -> bool:
        """Counts updates that are skipped as their gradient is not finite. ValueError after `max_skipped` in a row."""
        self.skipped = 0 if finite else self.skipped + 1
        self.skipped_total += not finite
        if not finite:
            self.warn(f"iteration {iteration + 1}: the gradient is not finite; its update is skipped")
        if self.skipped >= self.max_skipped:
            raise ValueError(f"{self.skipped} updates in a row had a gradient that is not finite: lower `lr`, or raise "
                             "`kl_weight`")
        return finite

    def check(self, *, spread: bool, falling: Sequence[str]) -> None:
        """Warns where no group of an iteration has samples of different quality, as of a constant reward, and where
        qualities fall while the reward rises. ValueError after FLAT iterations in a row without spread."""
        self.flat = 0 if spread else self.flat + 1
        advice = "give another `quality`, or `quality` none to train by the divergence alone"
        if not spread:
            self.warn(f"the reward is constant within every group, so there is nothing to learn: {advice}")
        if self.flat >= FLAT:
            raise ValueError(f"{FLAT} iterations had a reward that is constant within every group: {advice}")
        if falling:
            self.warn(f"the reward rises while {' and '.join(falling)} falls: it may be gamed")

    def save(self, done: int, record: dict[str, Any]) -> None:
        """Writes a checkpoint where one is due: every `save_every` iterations, at the end, and after a signal.

        `record` is what the checkpoint holds beside tensors. `Stopped` after a signal of `interruptible`.
        """
        stop = int(distributed.total(torch.tensor(self.stopped()), largest=True))
        if done % self.save_every == 0 or done == self.last or stop:
            held = record | {"settings": self.settings, "skipped": self.skipped, "flat": self.flat,
                             "skipped_total": self.skipped_total}
            try:
                save(self.out, done, tensors(*self.held), random_states(self.random, self.device), held,
                     keep=self.keep_checkpoints, sharded=self.sharded)
                self.saved = done
            except OSError as error:
                self.warn(f"{error}; training goes on, and the checkpoints before it stand")
        if stop:
            what = f"stopped after iteration {done}" + ("" if self.saved == done else f", of which {self.saved} saved")
            raise Stopped(f"{what}; go on with the same command and --resume", stop)


@contextmanager
def open_run(
    out: Path, settings: Mapping[str, Any], *, iterations: int, resume: bool = False, trackers: Sequence[str] = (),
    save_every: int = 10, keep_checkpoints: int = 3, max_skipped: int = 10, sharded: bool = False,
) -> Iterator[Run]:
    """A run's folder and all that surrounds its loop.

    `settings` as of `to_jsonable` are what its checkpoints record. ValueError where the folder holds a run that is not
    resumed; OSError where it cannot be written or another process trains in it. An error inside the loop that a user
    can mend says what is saved.
    """
    main = distributed.is_main()
    make_folder(out)
    with ExitStack() as stack:
        # the ranks of a run share its lock
        unlocked = distributed.on_all_ranks(lambda: stack.enter_context(locked(out / LOCK)) if main else None)
        checkpoint, complaints = start(out, resume=resume)
        if unlocked:
            complaints.append(f"nothing keeps another training out of {out}: {unlocked}")
        track = open_trackers(trackers if main else (), out, settings, resume=resume)
        display = stack.enter_context(Display(total=iterations, quiet=not main))
        stopped = stack.enter_context(interruptible())
        run = Run(out, settings, checkpoint=checkpoint, display=display, track=track, stopped=stopped,
                  iterations=iterations, resumed=resume, save_every=save_every, keep_checkpoints=keep_checkpoints,
                  max_skipped=max_skipped, sharded=sharded)
        for line in complaints:
            run.warn(line)
        try:
            with distributed.lost_contact():
                yield run
        except (ValueError, OSError) as error:
            if not run.inside:
                raise
            stands = f"the checkpoint of iteration {run.saved} stands: go on from it with `resume`"
            raise type(error)(f"{one_line(error)}; {stands if run.saved else 'nothing was saved yet'}") from error
