"""The command line and the package's files under locales that are not UTF-8."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODES = {"open": "r", "NamedTemporaryFile": "w+b", "TemporaryFile": "w+b"}


@pytest.fixture(scope="module", params=["POSIX", "GBK"])
def environment(request, tmp_path_factory):
    """What a process sees under the locale."""
    names = {
        "LC_ALL": "POSIX",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "COLUMNS": "100",
        "PYTHONPATH": str(ROOT),
    }
    if request.param == "GBK":
        folder = tmp_path_factory.mktemp("locales")
        made = shutil.which("localedef") and subprocess.run(
            ["localedef", "-i", "zh_CN", "-f", "GBK", folder / "zh_CN.gbk"], capture_output=True
        )
        if not made or made.returncode:
            pytest.skip("this system cannot make a GBK locale")
        names |= {"LC_ALL": "zh_CN.gbk", "LOCPATH": str(folder)}
    return {name: value for name, value in os.environ.items() if not name.startswith("LC_")} | names


def started(environment, *arguments, cwd=ROOT):
    return subprocess.run([sys.executable, "-m", "speedrl", *arguments], env=environment, cwd=cwd, capture_output=True)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["eval", "--help"]])
def test_help_needs_no_utf_8(environment, arguments):
    done = started(environment, *arguments)
    assert done.returncode == 0 and b"Usage" in done.stdout, done.stderr.decode(errors="replace")


def test_a_model_evaluates_with_prompts_and_a_reward_that_are_not_ascii(environment, tiny_generator_folder, tmp_path):
    (tmp_path / "p.txt").write_text("a café in 雪 👩‍🚀\n", encoding="utf-8")
    reward = '# 雪\ndef score(images, prompts):\n    assert prompts == ["a café in 雪 👩‍🚀"] * len(images), prompts\n'
    (tmp_path / "snow.py").write_text(reward + "    return images.mean((1, 2, 3))\n", encoding="utf-8")
    options = ["--prompts", "p.txt", "--quality", "snow:score", "--steps", "2", "--seeds", "1", "--count", "1"]
    done = started(environment, "eval", "--model", str(tiny_generator_folder), *options, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert '"reward": 0' in (tmp_path / "out/results.json").read_text(encoding="utf-8")


def test_every_text_file_is_opened_as_utf_8():
    """ruff's PLW1514 sees only calls on what it knows to be a path."""
    files, found = [path for name in ("speedrl", "experiments", "tests") for path in (ROOT / name).rglob("*.py")], []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and opens_text(node) and "encoding" not in {k.arg for k in node.keywords}:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert len(files) > 50 and not found


def opens_text(call: ast.Call) -> bool:
    """Whether a call opens, reads or writes a text file, or reads a process's output as text."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if any(keyword.arg in ("text", "universal_newlines") for keyword in call.keywords):
        return name in ("run", "Popen", "check_output")
    if name in ("read_text", "write_text"):
        return True
    of = function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
    if name not in MODES or of in ("os", "Image", "tarfile"):
        return False
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    given += call.args[: name != "open"] or call.args[1 if isinstance(function, ast.Name) else 0 :][:1]
    mode = next((value.value for value in given if isinstance(value, ast.Constant)), MODES[name])
    return "b" not in str(mode)
