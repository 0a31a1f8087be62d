"""Output that goes away: a closed pipe, a full disk, a closed descriptor. It never costs a run."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from speedrl.run.checkpoints import newest
from speedrl.run.display import Display
from speedrl.system.output import Output

ROOT = Path(__file__).parents[1]
BROKEN = [OSError(errno.EPIPE, "Broken pipe"), OSError(errno.ENOSPC, "No space left on device"),
          OSError(errno.EIO, "Input/output error"), ValueError("I/O operation on closed file.")]


class Broken(io.StringIO):
    """A stream that fails from some moment on."""

    def __init__(self, error):
        super().__init__()
        self.error, self.now = error, False

    def write(self, text):
        if self.now:
            raise self.error
        return super().write(text)

    def flush(self):
        if self.now:
            raise self.error


@pytest.mark.parametrize("error", BROKEN, ids=str)
def test_what_a_broken_stream_cannot_take_is_dropped(error, monkeypatch):
    stream = Broken(error)
    output = Output(stream)
    print("first", file=output)
    stream.now = True
    print("second", file=output, flush=True)
    output.writelines(["third\n"])
    stream.now = False
    assert stream.getvalue() == "first\n" and not output.isatty()
    monkeypatch.setattr(sys, "stdout", stream)
    with Display(total=2) as display:
        display.stage("a stage")
        stream.now = True
        display.warn("a warning")
        display.show({"iteration": 1, "reward": 0.5})
    assert stream.getvalue() == "first\na stage\n"


def test_letters_that_an_encoding_lacks_are_question_marks():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    print("a → b", file=Output(stream), flush=True)
    assert raw.getvalue() == b"a ? b\n"


QUALITY = "def blue(images, prompts):\n    return images[:, 2].mean((1, 2))\n"


@pytest.fixture
def command(tiny_generator_folder, tmp_path):
    """A training as a shell has it, whose output goes where `{}` says."""
    (tmp_path / "p.txt").write_text("a b\nc d\n", encoding="utf-8")
    (tmp_path / "rw.py").write_text(QUALITY, encoding="utf-8")
    flags = "--steps 2 --groups 2 --group-size 2 --no-compile --no-compare --search 0 --iterations 4 --save-every 3"
    given = f"--prompts p.txt --quality rw.py:blue --out run --device cpu --model '{tiny_generator_folder}' {flags}"
    return f"'{sys.executable}' -m speedrl train {given} {{}}; echo $? > status"


@pytest.mark.parametrize("output", ["2>&1 | true", "2>&1 | head -n 1", "> /dev/full 2>&1", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_training_whose_output_goes_away_is_whole_and_exits_0(command, tmp_path, output):
    if "/dev/full" in output and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    head, bar, tail = output.partition("|")
    line = command.format(head)
    line = f"({line}) {bar}{tail}" if bar else line
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "status").read_text(encoding="utf-8") == "0\n"
    rows = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["iteration"] for row in rows] == [1, 2, 3, 4]
    assert newest(tmp_path / "run") == (tmp_path / "run/checkpoints/000004", []) and (tmp_path / "run/model").is_dir()
