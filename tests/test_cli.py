"""The command line: what it writes, and what it says to bad input."""

import gc
import inspect
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from speedrl import cli

ROOT = Path(__file__).parent.parent


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def one_line(result, *, exit_code=2):
    assert result.exit_code == exit_code, result.output
    assert result.stdout == "" and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        (["an owl"], (256, 256)),
        (["an owl", "--count", 4], (4 + 2 * 260, 4 + 2 * 260)),
        (["an owl", "a fox", "--count", 2], None),
    ],
)
def test_sample_writes_a_png_and_says_where(tiny_generator_folder, tmp_path, arguments, size):
    out = tmp_path / "images/owl.png"
    result = run("sample", *arguments, "--steps", 2, "--model", tiny_generator_folder, "--out", out)
    assert result.exit_code == 0 and result.stdout == f"wrote {out}\n" and result.stderr == ""
    with Image.open(out) as image:
        assert image.format == "PNG" and (image.size == size or size is None)
        assert size or image.height == 4 + 2 * 260 and image.width > 4 + 2 * 260


def test_sample_is_reproducible_by_seed(tiny_generator_folder, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("sample", "an owl", "--seed", seed, "--model", tiny_generator_folder, "--out", tmp_path / f"{name}.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([""], "a prompt is empty"),
        (["an owl", "  "], "a prompt is empty"),
        (["an owl", "--steps", 0], "1 to 16"),
        (["an owl", "--steps", 17], "1 to 16"),
        (["an owl", "--model", "no/such/model"], "no model at no/such/model"),
        (["an owl", "--model", __file__], "is a file"),
        (["an owl", "--model", Path(__file__).parent], "no transformer/config.json"),
        (["an owl", "--device", "bogus"], "device bogus"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tiny_generator_folder, tmp_path, arguments, says):
    model = [] if "--model" in arguments else ["--model", tiny_generator_folder]
    assert says in one_line(run("sample", *arguments, *model, "--out", tmp_path / "x.png"))
    assert not (tmp_path / "x.png").exists()


def test_a_half_written_model_is_one_line_and_exit_2(tiny_generator_folder, tmp_path):
    import shutil

    model = shutil.copytree(tiny_generator_folder, tmp_path / "model")
    weights = model / "text_encoder/model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert "half written" in one_line(run("sample", "an owl", "--model", model, "--out", tmp_path / "x.png"))


def test_an_output_that_cannot_be_written_is_one_line_and_exit_2(tiny_generator_folder, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    options = ["--model", tiny_generator_folder, "--out", tmp_path / "file/x.png"]
    one_line(run("sample", "an owl", *options))
    assert run("sample", "an owl", "--model", tiny_generator_folder, "--out", tmp_path).exit_code == 2


@pytest.mark.parametrize(
    "arguments", [["sample"], ["sample", "an owl", "--count", "0"], ["paint"], ["train", "--lr", "x"]]
)
def test_usage_errors_exit_2(arguments):
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("prompt", ["-5 degrees", "-a cat", "--out of focus"])
def test_of_a_prompt_that_begins_with_a_dash_it_says_how_it_is_given(tiny_generator_folder, tmp_path, prompt):
    flags = ["--model", str(tiny_generator_folder), "--out", str(tmp_path / "x.png"), "--steps", "1"]
    result = CliRunner().invoke(cli.app, ["sample", *flags, prompt])
    assert result.exit_code == 2
    assert "A prompt that begins with - goes after --" in re.sub(r"[\s│]+", " ", result.output)
    assert CliRunner().invoke(cli.app, ["sample", *flags, "--", prompt]).exit_code == 0


def test_ctrl_c_is_one_line_and_exit_130(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt("stopped after iteration 3; go on with --resume")

    monkeypatch.setattr("speedrl.models.loading.load_generator", interrupted)
    result = run("sample", "an owl")
    assert result.exit_code == 130 and result.stderr == "stopped after iteration 3; go on with --resume\n"


@pytest.mark.parametrize(
    "target", ["generation.draw", "training.train", "evaluation.measuring.evaluate", "studies.ablations.ablate"]
)
def test_defaults_read_from_the_source_are_those_of_the_signature(target):
    module, _, function = target.rpartition(".")
    parameters = inspect.signature(getattr(__import__(f"speedrl.{module}", fromlist=[function]), function)).parameters
    expected = {name: p.default for name, p in parameters.items()}
    found = cli.defaults(target)
    expected = {k: ",".join(map(str, v)) if isinstance(v, tuple) and v else v for k, v in expected.items()}
    assert found == {name: value for name, value in expected.items() if value is not inspect.Parameter.empty}


LOADING = {"text_encoder", "size", "negative_prompt", "micro_conds"}  # together the keyword `loading`


NO_FLAG = {
    "loading",
    "steps_lr",
    "warmup",
    "clip_grad",
    "max_skipped",
    "keep_checkpoints",
    "lora_alpha",
    "lora_targets",
}


@pytest.mark.parametrize(
    ("command", "target", "more"),
    [("train", "training.train", LOADING | {"compare"}),
     ("evaluate", "evaluation.measuring.evaluate", LOADING | {"precision", "model", "base"})],
)
def test_every_keyword_of_the_function_is_an_option_but_what_nobody_turns(command, target, more):
    assert set(inspect.signature(getattr(cli, command)).parameters) == set(cli.defaults(target)) - NO_FLAG | more


def test_eval_forwards_lists_of_numbers(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "speedrl.evaluation.measuring.evaluate", lambda models, **options: seen.update(options, models=models)
    )
    assert run("eval", "--model", "a", "--model", "b", "--steps", "1,8", "--guidance", "1,2.5").exit_code == 0
    assert seen["models"] == ["a", "b"] and seen["steps"] == (1, 8) and seen["guidance"] == (1.0, 2.5)
    assert seen["temperature"] is None and seen["device"] in ("cpu", "cuda", "mps")
    assert "--steps" in one_line(run("eval", "--steps", "1;8"))


def test_ablate_forwards_what_is_given_and_nothing_else(monkeypatch):
    seen = {}
    monkeypatch.setattr("speedrl.studies.ablations.ablate", lambda name, **options: seen.update(options, name=name))
    options = [
        "--seeds",
        "0,1",
        "--iterations",
        3,
        "--eval-steps",
        "2,8",
        "--set",
        "lora=16",
        "--set",
        "checkpointing=true",
    ]
    assert run("ablate", "kl", *options).exit_code == 0
    assert seen.pop("out") == Path("runs/ablate")
    assert seen == {
        "name": "kl", "seeds": (0, 1), "model": "embedded", "beside": [], "device": "cpu", "jobs": 1,
        "quick": False, "iterations": 3, "lora": 16,
        "checkpointing": True, "eval_steps": (2, 8), "eval_count": 4, "eval_seeds": 1, "evaluation": {},
    }
    assert run("ablate").exit_code == 0 and seen["name"] == "all"
    assert "option of train" in one_line(run("ablate", "--set", "lora:16"))
    assert "option of train" in one_line(run("ablate", "--set", "loras=16"))


@pytest.mark.parametrize("program", [["cli.py"], ["-m", "speedrl"]])
def test_help_is_quick_and_needs_no_installation(program):
    began = time.time()
    environment = os.environ | {"PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, env=environment, capture_output=True, encoding="utf-8"
    )
    assert result.returncode == 0 and "sample" in result.stdout and "train" in result.stdout
    assert time.time() - began < 5  # seconds; torch alone would take about half of them


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sample", "[default: auto for a model that has one, else 8]"),
        ("train", "[default: 1 if the model's is below 2, else the model's]"),
        ("eval", "[default: the model's, and 1]"),
    ],
)
def test_help_says_what_an_option_is_without_a_value(command, words):
    shown = run(command, "--help").output
    assert words in " ".join(re.sub(r"[│╭╰─╮╯]", " ", shown).split())


def test_the_garbage_collector_works_again_after_loading():
    assert gc.isenabled()
    with pytest.raises(OSError), cli.uncollected():
        assert not gc.isenabled()
        raise OSError
    assert gc.isenabled()


def test_importing_the_command_line_imports_no_heavy_package():
    heavy = "{'torch', 'transformers', 'diffusers', 'open_clip', 'matplotlib', 'numpy', 'PIL', 'rich.console'}"
    code = f"import sys, speedrl.cli; print(*sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert result.returncode == 0 and result.stdout == "\n", result.stdout + result.stderr


def test_the_embedded_model_is_the_default(tmp_path):
    result = run("sample", "a red apple", "--out", tmp_path / "apple.png")
    if "not in this installation" in result.stderr:
        pytest.skip("the embedded model is not there")
    assert result.exit_code == 0 and (tmp_path / "apple.png").exists()
