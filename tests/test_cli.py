"""The command line: what it writes, and what it says to bad input."""

import gc
import inspect
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from speedrl import cli
from speedrl.system.options import options_of

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

    monkeypatch.setattr("speedrl.evaluation.drawing.load_generator", interrupted)
    result = run("sample", "an owl")
    assert result.exit_code == 130 and result.stderr == "stopped after iteration 3; go on with --resume\n"


def options_on_the_command_line(command):
    """The options of a command by name, as the parser has them."""
    context = typer.main.get_command(cli.app).make_context("speedrl", [command], resilient_parsing=True)
    found = cli.Commands.get_command(context.command, context, command)
    return {parameter.name: parameter for parameter in found.params}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_options_of_a_command_are_those_that_its_function_declares_with_its_defaults(command):
    function = cli.function_of(command)
    declared, signature = options_of(function), inspect.signature(function).parameters
    found = options_on_the_command_line(command)
    more = {"compare"} if command == "train" else set()
    assert declared and found.keys() == declared.keys() | more
    for name, (_, opt) in declared.items():
        default, here = signature[name].default, found[name].default
        if isinstance(default, tuple):
            default = list(default) if found[name].multiple else ",".join(map(str, default))
        if not opt.positional:
            assert found[name].required == (default is inspect.Parameter.empty), name
            # a path or a number may be text there; nothing may be an empty list
            assert found[name].required or (here or None) == (default or None) or str(here) == str(default), name
        flags = {part for flag in opt.flags for part in flag.split("/")}
        assert flags <= {*found[name].opts, *found[name].secondary_opts}, name


HIDDEN = {"steps_lr", "warmup", "clip_grad", "max_skipped", "keep_checkpoints", "lora_alpha", "lora_targets",
          "step_policy"}


def test_every_parameter_of_train_is_an_option_but_what_nobody_turns_on_the_command_line():
    from speedrl.training import train

    assert set(inspect.signature(train).parameters) - set(options_of(train)) == HIDDEN
    assert all(opt.help.endswith((".", "]", "]'")) for _, opt in options_of(train).values()), "help is sentences"


def test_a_checkpoint_is_exported_by_the_command(monkeypatch, tmp_path):
    seen = []
    from speedrl.run.exporting import export

    def exported(checkpoint, **how):
        seen.append((checkpoint, how))
        return how["out"] / "model"

    exported.__signature__, exported.__annotations__ = inspect.signature(export), export.__annotations__
    monkeypatch.setattr("speedrl.run.exporting.export", exported)
    result = run("export", "runs/x", "--out", tmp_path, "--merge")
    assert result.exit_code == 0 and result.stdout == f"wrote {tmp_path / 'model'}\n"
    assert seen == [("runs/x", {"out": tmp_path, "raw": False, "merge": True, "model": None})]
    assert run("export", "runs/x").exit_code == run("export", "--out", tmp_path).exit_code == 2


def test_a_training_gets_what_is_given_and_is_compared_with_its_base(monkeypatch, tmp_path):
    seen, compared = {}, {}
    monkeypatch.setitem(sys.modules, "speedrl.evaluation.reports",
                        types.SimpleNamespace(report=lambda *a, **how: compared.update(how, places=a)))

    def train(*, model="embedded", prompts=None, quality="embedded", reward_weights=(), compile=True, out="runs/x",
              text_encoder=None, size=None, negative_prompt=None, micro_conds=None, device="auto", **more):
        seen.update(more, model=model)
        return Path(out) / "model"

    train.__signature__, train.__annotations__ = real_signature_of_train()
    monkeypatch.setattr("speedrl.training.train", train)
    flags = ["--model", "m", "--out", tmp_path / "run", "--lr", "0.5", "--beta", 0.25, "--tracker", "wandb",
             "--quality", "clip", "--size", "32x16", "--no-bf16", "--device", "cpu"]
    result = run("train", *flags)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"wrote {tmp_path / 'run/model'}\n"
    assert seen["model"] == "m" and seen["lr"] == 0.5 and seen["kl_weight"] == 0.25 and seen["bf16"] is False
    assert seen["trackers"] == ["wandb"] and not HIDDEN & seen.keys()
    assert compared["places"] == ("m", tmp_path / "run/model") and compared["quality"] == "clip"
    assert compared["size"] == "32x16" and compared["device"] == "cpu"
    compared.clear()
    assert run("train", *flags, "--no-compare").exit_code == 0 and not compared


def real_signature_of_train():
    from speedrl.training import train

    return inspect.signature(train), train.__annotations__


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


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
                                   torch.OutOfMemoryError("out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_where_memory_runs_out_one_line_says_what_takes_less(monkeypatch, error):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr("speedrl.evaluation.drawing.load_generator", failing)
    assert "give --precision bf16, fewer images at a time" in one_line(run("sample", "an owl"))


def test_another_error_is_not_hidden(monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr("speedrl.evaluation.drawing.load_generator", failing)
    assert isinstance(run("sample", "an owl").exception, RuntimeError)


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
