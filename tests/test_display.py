"""The terminal while a model trains: as many columns as fit, trends, and plain lines where there is no terminal."""

import os
import pty
import re
import subprocess
import sys

import pytest

from speedrl.run.display import columns_that_fit, moving_means, number, sparkline, time_left

ROW = {"iteration": 12, "reward": 0.5312, "quality": 0.4811, "steps": 6.25, "group_std": 0.2, "kl": 0.0312,
       "clip_fraction": 0.0, "ratio_max": 1.0, "grad_norm": 0.55, "kept": 0.84, "images_per_second": 9.31}
SCRIPT = f"""
from speedrl.run.display import Display
row = {ROW!r}
with Display(total=30) as display:
    display.stage("compiling")
    for i in range(20):
        display.show(row | {{"iteration": i + 1, "reward": 0.3 + i / 100, "steps": 8.0 - i / 10}})
"""


STAGES = f"""
import time
from speedrl.run.display import Display
with Display(total=30, every=0.5) as display:
    display.stage("short")
    display.stage("searching", total=4)
    display.advance()
    time.sleep(0.8)
    display.stage("compiling")
    time.sleep(0.8)
    display.show({ROW!r})
    time.sleep(0.8)
"""


def in_terminal(columns: int, *, term: str = "xterm", script: str = SCRIPT) -> str:
    """What a script prints to a pseudo-terminal of so many columns."""
    parent, child = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "LINES": "40", "TERM": term, "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=child, stderr=child, env=environment)
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    assert process.wait() == 0
    os.close(parent)
    return shown.decode("utf-8")


@pytest.mark.parametrize("columns", [60, 80, 160])
def test_a_terminal_shows_whole_columns_and_the_important_ones_first(columns):
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", in_terminal(columns)).replace("\r", "")
    last = shown[shown.rindex("reward    ") :]
    heads = next(line for line in last.splitlines() if line.strip().startswith("it "))
    assert "…" not in shown
    assert {"reward", "quality", "steps", "kl"} <= set(heads.split())
    assert ("group std" in heads) == (columns == 160)
    assert max(map(len, last.splitlines())) <= columns
    assert "0.490" in last and re.search(r"reward +0\.3\d\d [▁▂▃▄▅▆▇█]+ 0\.4\d\d", last)


def test_without_a_terminal_each_iteration_is_a_line():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, encoding="utf-8", check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "compiling" and len(lines) == 21 and lines[-1].startswith("iteration 20  reward 0.490")


def test_without_a_terminal_a_long_stage_says_how_far_it_is_and_how_long_it_takes():
    done = subprocess.run([sys.executable, "-c", STAGES], capture_output=True, encoding="utf-8", check=True)
    *stages, compiling, row = done.stdout.splitlines()
    assert stages == ["short", "searching", "searching: 1 of 4, about 2 s left", "compiling"]
    assert re.fullmatch(r"compiling: \d s so far", compiling) and row.startswith("iteration 12")


def test_in_a_terminal_a_stage_of_known_length_has_a_bar_until_it_ends():
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", in_terminal(100, script=STAGES)).replace("\r", "")
    assert re.search(r"searching .*1/4", shown) and "so far" not in shown
    assert "searching" not in shown[shown.rindex("training") :] and "1/30" in shown[shown.rindex("training") :]


def test_a_time_left_is_in_seconds_or_minutes():
    assert [time_left(x) for x in (0.4, 89, 95, 3600)] == ["0 s", "89 s", "2 min", "60 min"]


def test_a_dumb_terminal_gets_plain_lines_as_they_come():
    shown = in_terminal(80, term="dumb")
    assert "\x1b" not in shown and "iteration 1  reward 0.300" in shown


def test_columns_are_cut_by_importance():
    assert columns_that_fit(list(ROW), 60) == ["iteration", "reward", "quality", "steps", "kl", "clip_fraction"]
    assert len(columns_that_fit(list(ROW), 160)) == len(ROW)


def test_sparklines_are_moving_means_between_the_extremes():
    assert moving_means([1.0, 1.0, 3.0, 3.0], 2) == [1.0, 3.0]
    assert sparkline([0.0, 1.0, 2.0], width=10) == "▁▃█"[0] + sparkline([0.0, 1.0, 2.0], width=10)[1] + "█"
    assert sparkline([2.0, 2.0], width=4) == "▁▁"


def test_numbers_are_short():
    assert [number(x) for x in (0.0, 0.5312, 12, 1e-7, 123456.0)] == ["0.000", "0.531", "12", "1e-07", "1e+05"]
    assert number(None) == "–"
