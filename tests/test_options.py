"""Every option of `speedrl train` acts when it is changed alone, or is refused; those that must not change what is
learned change what they are for."""

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import speedrl.evaluation.reports
import speedrl.models.meissonic
import speedrl.training
from speedrl import cli
from speedrl.models.loading import load_generator
from speedrl.system.options import Opt, as_flags, check_options, flag_of, options_of
from speedrl.training import train


def red(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def green(images, prompts):
    return images[:, 1].mean((1, 2))


class Case(NamedTuple):
    """How an option is changed: its flags, {folder} and {model} filled in, and what must come of it.

    `does` "differs": metrics or the saved model are others. "refused": exit 2 and one line. "same": metrics and the
    saved model are the same, and `by` is another: what the option is for. `also` is given on both sides where the
    option acts only beside another, and refused without it if `alone` is "refused".
    """

    flags: str
    does: str = "differs"
    by: str = ""
    also: str = ""
    alone: str = ""


CASES = {
    "model": Case("--model {folder}/other"),
    "prompts": Case("--prompts {folder}/q.txt"),
    "quality": Case("--quality tests.test_options:green"),
    "steps": Case("--steps 2-8"),
    "steps_reward": Case("--steps-reward 0"),
    "iterations": Case("--iterations 3"),
    "groups": Case("--groups 3"),
    "group_size": Case("--group-size 5"),
    "lr": Case("--lr 1e-4"),
    "kl_weight": Case("--kl-weight 3"),
    "lora": Case("--lora 2"),
    "device": Case("--device nowhere", "refused"),
    "out": Case("--out {folder}/elsewhere", "same", by="out"),
    "seed": Case("--seed 1"),
    "resume": Case("--resume", "same", by="resume"),
    "likelihood": Case("--likelihood exact"),
    "kl": Case("--kl k3"),
    "clip_range": Case("--clip-range 0.0001", also="--updates 3", alone="refused"),
    "updates": Case("--updates 2"),
    "percentile": Case("--percentile 50"),
    "min_quality": Case("--min-quality 0"),
    "advantage_std": Case("--advantage-std none"),
    "hindsight": Case("--hindsight 1"),
    "hindsight_share": Case("--hindsight-share 0.3", also="--hindsight 1", alone="refused"),
    "train_steps": Case("--train-steps 2"),
    "guidance": Case("--guidance 1"),
    "reference_guidance": Case("--reference-guidance 1"),
    "order": Case("--order random"),
    "schedule": Case("--schedule linear"),
    "temperature": Case("--temperature 9"),
    "remask": Case("--remask 0"),
    "shared_noise": Case("--no-shared-noise"),
    "search": Case("--search 1"),
    "quality_gate": Case("--quality-gate 0.9"),
    "quality_clip": Case("--quality-clip 0.1"),
    "reward_weights": Case("--reward-weights x=y", "refused"),
    "micro_batch": Case("--micro-batch 3", "same", by="losses"),  # the gradient is a sum over micro-batches
    "checkpointing": Case("--checkpointing", "same", by="recomputed"),  # the same blocks, computed twice
    "bf16": Case("--bf16"),
    "compile": Case("--compile", "same", by="compiled"),  # here it compiles nothing, as its calls are counted
    "parallel": Case("--parallel fsdp", "refused"),  # without torchrun
    "offload": Case("--offload", "refused"),  # without --parallel fsdp
    "trackers": Case("--tracker tensorboard", "same", by="files"),  # the metrics go there too
    "compare": Case("--compare", "same", by="compared"),
    "ema": Case("--ema 0"),
    "save_every": Case("--save-every 1", "same", by="files"),  # more checkpoints
    "text_encoder": Case("--text-encoder {folder}/text"),
    "size": Case("--size 16x32"),
    "negative_prompt": Case("--negative-prompt bad"),
    "micro_conds": Case("--micro-conds 99,16,3,0,1"),
}
BASE = (
    "--model {model} --prompts {folder}/p.txt --quality tests.test_options:red --steps 6-8 --iterations 2 --groups 2 "
    "--group-size 4 --hindsight 0 --lr 3e-3 --search 0 --no-compare --no-compile --no-bf16 --device cpu "
    "--out {folder}/run"
)


@pytest.fixture(scope="module")
def place(tiny_generator_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    (folder / "p.txt").write_text("a b\nc d\ne f\n", encoding="utf-8")
    (folder / "q.txt").write_text("x y\nz z\nu v\n", encoding="utf-8")
    other = shutil.copytree(tiny_generator_folder, folder / "other")
    scale(other / "transformer/diffusion_pytorch_model.safetensors", 1.1)
    scale(shutil.copytree(tiny_generator_folder / "text_encoder", folder / "text") / "model.safetensors", 1.5)
    return folder


def scale(path: Path, factor: float) -> None:
    save_file({k: v * factor if v.is_floating_point() else v for k, v in load_file(path).items()}, path,
              metadata={"format": "pt"})


def run_once(flags: str, place: Path, model: Path) -> dict[str, Any]:
    """What comes of a command: its status, what is learned, and what the options beside it are for."""
    seen = {"losses": 0, "recomputed": 0, "compiled": 0, "compared": 0}

    def counted(name: str, plain: Callable) -> Callable:
        def call(*arguments, **how):
            seen[name] += 1
            return plain(*arguments, **how)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speedrl.training, "policy_loss", counted("losses", speedrl.training.policy_loss))
        meissonic = speedrl.models.meissonic
        patch.setattr(meissonic, "checkpoint", counted("recomputed", meissonic.checkpoint))
        patch.setattr(meissonic.MeissonicTransformer, "compile_blocks", counted("compiled", lambda self: None))
        patch.setattr(torch, "compile", counted("compiled", lambda function, **how: function))
        patch.setattr(speedrl.evaluation.reports, "report", counted("compared", lambda *a, **how: []))
        given = [text.format(folder=place, model=model) for text in ("train " + flags).split()]
        result = CliRunner().invoke(cli.app, given)
    out = Path(given[len(given) - 1 - given[::-1].index("--out") + 1])
    found = {"status": result.exit_code, "said": result.stderr, "out": str(out), **seen}
    if result.exit_code == 0:
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        timed = ("images_per_second", "compile_seconds")
        found["rows"] = [{k: v for k, v in row.items() if k not in timed} for row in rows]
        saved = sorted(path for path in out.rglob("*") if path.is_file())
        found["files"] = sorted({str(path.relative_to(out).parent) for path in saved})
        kept = [path for path in saved if path.relative_to(out).parts[0] in ("model", "adapter")]
        sums = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}
        found["weights"] = {name: value for name, value in sums.items() if name.endswith(".safetensors")}
    elif result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    shutil.rmtree(out, ignore_errors=True)
    return found


@pytest.fixture(scope="module")
def base(place, tiny_generator_folder):
    """What comes of the base's options, and of these with more, once each."""
    known: dict[str, dict[str, Any]] = {}

    def of(also: str) -> dict[str, Any]:
        if also not in known:
            known[also] = run_once(f"{BASE} {also}", place, tiny_generator_folder)
        return known[also]

    return of


def test_every_option_has_a_case():
    """A new option needs a line in the table."""
    assert CASES.keys() == {*options_of(train), "compare"}


def test_the_same_options_give_the_same_run(base, place, tiny_generator_folder):
    again = run_once(BASE, place, tiny_generator_folder)
    assert again["status"] == 0 and again == base("")
    assert all(row["grad_norm"] > 0 for row in again["rows"])


def refused(found: dict[str, Any]) -> bool:
    one_line = found["said"].startswith("error: ") and found["said"].count("\n") == 1
    return found["status"] == 2 and (one_line or "Usage" in found["said"])


@pytest.mark.parametrize("flags", [
    "--kl k3 --kl-weight 0", "--reference-guidance 1 --kl-weight 0", "--likelihood sequence", "--percentile 5",
    "--train-steps 8", "--lora 0", "--quality none --search 2", "--kl k1", "--kl none", "--likelihood exactly",
])
def test_an_option_that_cannot_act_beside_the_others_is_refused(flags, place, tiny_generator_folder):
    assert refused(run_once(f"{BASE} {flags}", place, tiny_generator_folder))


def test_the_reference_serves_hindsight_where_the_divergence_weighs_nothing(base, place, tiny_generator_folder):
    also = "--kl-weight 0 --hindsight 1"
    changed = run_once(f"{BASE} {also} --reference-guidance 1", place, tiny_generator_folder)
    assert changed["status"] == 0 and changed["rows"] != base(also)["rows"]


@pytest.mark.parametrize("name", [name for name in CASES if name != "resume"])
def test_an_option_that_is_changed_alone_acts_or_is_refused(name, base, place, tiny_generator_folder):
    case = CASES[name]
    changed = run_once(f"{BASE} {case.also} {case.flags}", place, tiny_generator_folder)
    if case.does == "refused":
        assert refused(changed), changed
        return
    before = base(case.also)
    assert changed["status"] == before["status"] == 0, changed["said"]
    learned = changed["rows"] != before["rows"] or changed["weights"] != before["weights"]
    if case.does == "differs":
        assert learned, f"{case.flags} changes nothing"
    else:
        close = all(a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-6)
                    for a, b in zip(changed["rows"], before["rows"], strict=True) for k in a)
        assert close and changed[case.by] != before[case.by]
    if case.alone == "refused":
        assert refused(run_once(f"{BASE} {case.flags}", place, tiny_generator_folder))


def test_resume_goes_on_where_the_run_stands_and_without_it_the_folder_is_refused(place, tiny_generator_folder):
    model, folder = tiny_generator_folder, place / "kept"
    given = [text.format(folder=place, model=model) for text in ("train " + BASE).split()] + ["--out", str(folder)]
    for more, status in (([], 0), ([], 2), (["--resume", "--iterations", "3"], 0)):
        result = CliRunner().invoke(cli.app, [*given, *more])
        assert result.exit_code == status, result.output
    assert "--resume" in CliRunner().invoke(cli.app, given).stderr
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3]


def test_no_iterations_search_the_sampler_and_leave_the_weights(place, tiny_generator_folder):
    model, folder = tiny_generator_folder, place / "searched"
    given = [text.format(folder=place, model=model) for text in ("train " + BASE).split()]
    given = [*given, "--iterations", "0", "--out", str(folder)]
    assert "--search above 0" in CliRunner().invoke(cli.app, [*given, "--search", "0"]).stderr
    result = CliRunner().invoke(cli.app, [*given, "--search", "1"])
    assert result.exit_code == 0, result.output
    before, after = load_generator(str(model)), load_generator(str(folder))
    assert after.sampler.scalars is not None and before.sampler.scalars is None
    for name, value in before.transformer.state_dict().items():
        torch.testing.assert_close(after.transformer.state_dict()[name], value, rtol=0, atol=0)


def declared(
    lr: Annotated[float, Opt("", flags=("--lr", "--learning-rate"), above=0)] = 1.0,
    share: Annotated[float, Opt("", least=0, below=1)] = 0.5,
    count: Annotated[int | None, Opt("", least=1, most=9)] = None,
    low: Annotated[float, Opt("", least=-float("inf"))] = -2.0,
    kind: Annotated[str, Opt("", choices=("one", "two"))] = "one",
    kinds: Annotated[list[str], Opt("", choices=("one", "two"))] = [],  # noqa: B006
    on: Annotated[bool, Opt("")] = True,
    bf16: Annotated[bool | None, Opt("", flags=("--bf16/--no-bf16",))] = None,
    plain: float = 7.0,
) -> None: ...


@pytest.mark.parametrize(
    "values",
    [{"lr": 1e-9}, {"share": 0}, {"share": 0.999}, {"count": 1}, {"count": 9}, {"count": None}, {"low": -float("inf")},
     {"low": 3.0}, {"kind": "two"}, {"kind": len}, {"kinds": ["one", "two"]}, {"kinds": []}, {"on": False},
     {"plain": float("nan")}, {"other": -1}, {}],
)
def test_values_within_their_bounds_pass_as_do_functions_and_what_is_not_declared(values):
    check_options(declared, values)


@pytest.mark.parametrize(
    ("values", "says"),
    [({"lr": 0}, "`lr` must be above 0, got 0"), ({"share": 1}, "`share` must be at least 0 and below 1, got 1"),
     ({"share": -0.1}, "`share` must be at least 0 and below 1, got -0.1"),
     ({"count": 0}, "`count` must be at least 1 and at most 9, got 0"), ({"count": 10}, "at most 9, got 10"),
     ({"lr": float("nan")}, "`lr` must be a finite number, got nan"), ({"lr": float("inf")}, "finite number, got inf"),
     ({"low": float("inf")}, "`low` must be a finite number"), ({"share": -float("inf")}, "`share` must be a finite"),
     ({"kind": "three"}, "`kind` must be one, two, got 'three'"), ({"kinds": ["one", "x"]}, "`kinds` .* got 'x'"),
     ({"kinds": ("x",)}, "`kinds` must be one, two, got 'x'")],
)
def test_values_out_of_bounds_are_named_with_the_bounds(values, says):
    with pytest.raises(ValueError, match=says):
        check_options(declared, values)


def test_a_message_names_arguments_and_the_command_line_their_flags():
    options = options_of(declared)
    said = as_flags("`lr` must be above 0; `max_skipped` and `bf16` too, not `1` or `Sampler`", options)
    assert said == "--lr must be above 0; --max-skipped and --bf16 too, not `1` or `Sampler`"
    assert [flag_of(name, opt) for name, (_, opt) in options.items()] == [
        "--lr", "--share", "--count", "--low", "--kind", "--kinds", "--on", "--bf16"]
    assert flag_of("group_size") == "--group-size"
    assert as_flags("`trackers` and `group_size`", options_of(train)) == "--tracker and --group-size"


def test_a_switch_can_be_turned_on_and_off():
    assert options_of(declared)["on"][1].flags == ("--on/--no-on",)
    shown = CliRunner().invoke(cli.app, ["train", "--help"], env={"COLUMNS": "200"}).output
    for name in ("resume", "checkpointing", "compile", "compare", "bf16", "offload"):
        assert f"--{name}" in shown and f"--no-{name}" in shown, name


def test_every_default_of_train_is_within_its_own_bounds():
    check_options(train, {name: p.default for name, p in inspect.signature(train).parameters.items()})
