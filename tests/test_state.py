"""Checkpoints and faults: what is interrupted, damaged or refused by the system loses nothing but the work since."""

import errno
import functools
import json
import os
import random
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import speedrl.generation
import speedrl.run.checkpoints
import speedrl.training
from speedrl.cli import app
from speedrl.generation import sample
from speedrl.learner import Learner
from speedrl.models.loading import load_generator
from speedrl.run.checkpoints import all_checkpoints, changed, newest, to_jsonable
from speedrl.run.exporting import export
from speedrl.system.errors import Stopped
from speedrl.system.files import append_lines, damage, locked, seal
from speedrl.training import train
from tests.ranks import command, finish, start


def blue(images, prompts):
    return images[:, 2].mean((1, 2))


def flat(images, prompts):
    """Falls while the other rises, in noise of the process's own generator."""
    return -images[:, 2].mean((1, 2)) + 1e-3 * torch.rand(len(images))


def given(model, folder):
    (folder / "prompts.txt").write_text("a b\nc d\ne f\n", encoding="utf-8")
    return dict(model=str(model), prompts=folder / "prompts.txt", quality="tests.test_state:blue", steps="2", groups=2,
                group_size=2, compile=False, bf16=False, lr=3e-3, save_every=1, search=0)


@pytest.fixture
def options(tiny_generator_folder, tmp_path):
    return given(tiny_generator_folder, tmp_path)


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    timed = ("images_per_second", "compile_seconds")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def same_tensors(one, other):
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert files and files == sorted(path.relative_to(other) for path in other.rglob("*.safetensors"))
    for path in files:
        first, second = load_file(one / path), load_file(other / path)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first), path
    return True


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes that these tests start: sums round as the number of threads has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def three(tiny_generator_folder, tmp_path_factory):
    """A run of three checkpoints, which tests copy."""
    folder = tmp_path_factory.mktemp("three")
    train(out=folder / "run", iterations=3, **given(tiny_generator_folder, folder))
    return folder / "run"


@pytest.fixture
def run(three, tmp_path):
    return shutil.copytree(three, tmp_path / "run")


def test_a_resumed_run_is_the_uninterrupted_one_in_weights_average_optimizer_metrics_and_warnings(options, tmp_path):
    """With what a run has of its own: the step policy, the searched sampler, the gap, the moments of the rewards."""
    options |= {"quality": "tests.test_state:blue=1,tests.test_state:flat=0.5", "ema": 0.9, "steps": "1-3", "search": 1}
    options |= {"steps_reward": 0.5, "group_size": 4}
    torch.manual_seed(0)
    train(out=tmp_path / "whole", iterations=6, updates=2, **options)
    torch.manual_seed(0)
    train(out=tmp_path / "parts", iterations=4, updates=2, **options)
    torch.manual_seed(1)  # what the checkpoint holds counts
    train(out=tmp_path / "parts", iterations=6, updates=2, resume=True, **options)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert same_tensors(tmp_path / "whole/model", tmp_path / "parts/model")
    assert same_tensors(tmp_path / "whole/checkpoints/000006", tmp_path / "parts/checkpoints/000006")
    drawn = [sample(load_generator(tmp_path / name), ["a b", "e f"], steps=3, seed=5) for name in ("whole", "parts")]
    assert torch.equal(*drawn) and drawn[0].std() > 0
    held, records = {}, []
    for name in ("whole", "parts"):
        folder = tmp_path / name / "checkpoints/000006"
        held = load_file(folder / "tensors.safetensors")
        records.append(json.loads((folder / "state.json").read_text(encoding="utf-8")))
        records[-1].pop("settings")
    assert {key.partition(".")[0] for key in held} == {"transformer", "average", "optimizer"}
    assert {"transformer.steps.bias", "average.steps.bias", "optimizer.exp_avg.steps.bias"} <= held.keys()
    assert held["transformer.steps.bias"].abs().max() > 0
    assert records[0] == records[1] and len(records[0]["recent"]) == 6
    assert records[0]["gap"] > 0 and torch.tensor(records[0]["search"]).abs().max() > 0
    assert records[0]["moments"].keys() == {"tests.test_state:blue", "tests.test_state:flat"}


def test_the_newest_few_checkpoints_are_kept_each_of_plain_files_named_in_its_manifest(options, tmp_path):
    train(out=tmp_path / "run", iterations=4, keep_checkpoints=2, **options)
    assert [path.name for path in all_checkpoints(tmp_path / "run")] == ["000004", "000003"]
    names = {path.name for path in (tmp_path / "run/checkpoints/000004").iterdir()}
    assert names == {"manifest.json", "state.json", "tensors.safetensors", "random.st"}
    record = json.loads((tmp_path / "run/checkpoints/000004/state.json").read_text(encoding="utf-8"))
    assert record["iteration"] == 4 and record["settings"]["lr"] == 3e-3 and record["settings"]["seed"] == 0
    assert record["version"] and record["ranks"] == 1


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def leads_away(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink, leads_away])
def test_damage_is_named(run, name, harm):
    if (name, harm) == ("manifest.json", leads_away):
        pytest.skip("a manifest elsewhere still tells the truth")
    newest_folder = run / "checkpoints/000003"
    assert damage(newest_folder) is None
    harm(newest_folder / name)
    found, complaints = newest(run)
    assert found == run / "checkpoints/000002"
    assert len(complaints) == 1 and "000003 is damaged" in complaints[0] and "\n" not in complaints[0]


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one_and_ends_the_same(options, run, tmp_path, capsys):
    flip(run / "checkpoints/000003/tensors.safetensors")
    train(out=run, iterations=4, resume=True, **options)
    assert "000003 is damaged: tensors.safetensors has another checksum" in capsys.readouterr().out
    train(out=tmp_path / "whole", iterations=4, **options)
    assert metrics(run) == metrics(tmp_path / "whole") and same_tensors(run / "model", tmp_path / "whole/model")
    assert newest(run) == (run / "checkpoints/000004", [])


def test_a_manifest_cannot_lead_out_of_its_folder(run, tmp_path):
    folder = run / "checkpoints/000003"
    sums = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (run / "secret").write_text("x", encoding="utf-8")
    for name in ("../../secret", str(run / "secret"), "..", ""):
        (folder / "manifest.json").write_text(json.dumps({name: {"bytes": 1, "sha256": "0"}} | sums), encoding="utf-8")
        assert "leads out of the folder" in damage(folder)
    (folder / "manifest.json").write_text(json.dumps(sums), encoding="utf-8")
    (folder / "extra.pt").write_text("", encoding="utf-8")
    assert "extra.pt is not in manifest.json" in damage(folder)
    for text in ("[]", '{"a": 1}', '{"a": {"bytes": 1}}', "\x00", "null"):
        (folder / "manifest.json").write_text(text, encoding="utf-8")
        assert damage(folder) == "manifest.json cannot be read"


def test_a_pickle_in_place_of_tensors_is_refused_and_not_run(options, run, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    for folder in all_checkpoints(run):
        torch.save(Evil(), folder / "tensors.safetensors")
        (folder / "manifest.json").unlink()
        seal(folder)
    with pytest.raises(ValueError, match="another model's or another training's"):
        train(out=run, iterations=4, resume=True, **options)
    assert not (tmp_path / "pwned").exists()


def test_resuming_what_has_no_checkpoint_yet_starts_and_another_models_is_refused(options, run, tmp_path, capsys):
    shutil.rmtree(run / "checkpoints")
    train(out=run, iterations=2, resume=True, **options)
    assert [row["iteration"] for row in metrics(run)] == [1, 2]
    with pytest.raises(ValueError, match="another model's .*: it was trained with `lora` not given, now 2: give what"):
        train(out=run, iterations=4, resume=True, lora=2, **options)
    with pytest.raises(ValueError, match="another model's .*: it was trained with `steps` 2, now 1-2: give what"):
        train(out=run, iterations=4, resume=True, **options | {"steps": "1-2"})
    train(out=run, iterations=3, resume=True, **options | {"lr": 1e-3})
    assert "other settings: --lr 0.003, now 0.001" in " ".join(capsys.readouterr().out.split())
    assert changed({"lr": 1.0, "out": "a"}, {"lr": 1.0, "out": "b", "ema": None}) == []
    now = changed({"loading": None}, {"loading": {"size": [16, 32]}})
    assert now == ["`size` not given, now [16, 32]"] and changed({"loading": {}}, {"loading": None}) == []


class Brightness:
    """A reward that is an object, whose address differs from run to run."""

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))

    def method(self, images, prompts):
        return self(images, prompts)


def test_a_reward_of_any_kind_is_recorded_by_name_and_resuming_with_it_is_no_change(options, tmp_path, capsys):
    here = blue.__module__
    kinds = {f"{here}:Brightness": Brightness(), f"{here}:Brightness.method": Brightness().method,
             f"{here}:blue": functools.partial(blue), "torch.nn.modules.linear:Identity": torch.nn.Identity()}
    assert to_jsonable(kinds) == {name: name for name in kinds}
    assert to_jsonable({"a": tmp_path, "b": torch.float16, "c": (1, None)}) == {
        "a": str(tmp_path), "b": "torch.float16", "c": [1, None]}
    for iterations in (1, 2):
        train(out=tmp_path / "run", iterations=iterations, resume=True, **options | {"quality": Brightness()})
    assert "other settings" not in capsys.readouterr().out


def test_prompts_may_come_from_a_generator_and_are_recorded(options, tmp_path, capsys):
    lines = options["prompts"].read_text(encoding="utf-8").split("\n")
    for iterations in (1, 2):
        given = options | {"prompts": (line for line in lines if line)}
        train(out=tmp_path / "run", iterations=iterations, resume=True, **given)
    train(out=tmp_path / "whole", iterations=2, **options)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert "other settings" not in capsys.readouterr().out
    state = json.loads((tmp_path / "run/checkpoints/000002/state.json").read_text(encoding="utf-8"))
    assert state["settings"]["prompts"] == ["a b", "c d", "e f"]


def test_a_checkpoint_holds_what_the_models_own_settings_were_and_giving_them_is_no_change(options, run, capsys):
    settings = json.loads((run / "checkpoints/000003/state.json").read_text(encoding="utf-8"))["settings"]
    own = {"temperature": 1.5, "reference_guidance": 3.0, "schedule": "cosine", "order": "confidence"}
    assert {name: settings[name] for name in own} == own
    options |= {"prompts": settings["prompts"]}
    train(out=run, iterations=4, resume=True, **options)
    train(out=run, iterations=5, resume=True, **options, **own)
    assert "other settings" not in capsys.readouterr().out
    train(out=run, iterations=6, resume=True, **options, schedule="linear")
    assert "other settings: --schedule cosine, now linear" in " ".join(capsys.readouterr().out.split())


class Full:
    """A disk that is full from some moment on: every file opened for writing refuses what is written."""

    says, number = "No space left", errno.ENOSPC

    def __init__(self, monkeypatch, run):
        self.now, plain = False, Path.open

        def opened(path, mode="r", *arguments, **options):
            if self.now and mode[0] in "aw":
                raise OSError(self.number, os.strerror(self.number), str(path))
            return plain(path, mode, *arguments, **options)

        def saved(tensors, path, *arguments, **options):
            if self.now:
                Path(path).write_bytes(b"half")
                raise OSError(self.number, os.strerror(self.number), str(path))
            return save_file(tensors, path, *arguments, **options)

        save_file = speedrl.run.checkpoints.save_file
        monkeypatch.setattr(Path, "open", opened)
        monkeypatch.setattr(speedrl.run.checkpoints, "save_file", saved)


class Refused(Full):
    """Folders that cannot be written from some moment on, as the system says it: none is made, no file is opened."""

    says, number = "Permission denied", errno.EACCES

    def __init__(self, monkeypatch, run):
        super().__init__(monkeypatch, run)
        plain = os.mkdir

        def made(path, *arguments, **options):
            if self.now:
                raise OSError(self.number, os.strerror(self.number), str(path))
            return plain(path, *arguments, **options)

        monkeypatch.setattr(os, "mkdir", made)


class ReadOnly:
    """The same by the run's own permissions."""

    says = "Permission denied"

    def __init__(self, monkeypatch, run):
        self.run = run
        need_permissions(run.parent)

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "now" and self.run.exists():
            for path in (self.run, self.run / "checkpoints", self.run / "metrics.jsonl"):
                if path.exists():
                    path.chmod((0o555 if value else 0o755) if path.is_dir() else 0o444 if value else 0o644)


def need_permissions(folder):
    (folder / "probe").mkdir(mode=0o555)
    if os.access(folder / "probe", os.W_OK):
        pytest.skip("permissions do not bind this user, as they do not bind root")


@pytest.mark.parametrize("fault", [Full, Refused, ReadOnly])
def test_where_nothing_can_be_written_training_goes_on_and_what_was_saved_stands(
    options, tmp_path, monkeypatch, capsys, fault
):
    full = fault(monkeypatch, tmp_path / "run")
    plain = speedrl.training.decode

    def decode(*arguments, **options):
        rows = len(metrics(tmp_path / "run")) if (tmp_path / "run/metrics.jsonl").exists() else 0
        decode.calls += 1
        full.now = decode.calls in (3, 4)  # full while iterations 3 and 4 end
        assert rows == (2 if decode.calls == 4 else decode.calls - 1 if decode.calls < 4 else rows)
        return plain(*arguments, **options)

    decode.calls = 0
    monkeypatch.setattr(speedrl.training, "decode", decode)
    train(out=tmp_path / "run", iterations=5, **options)
    said = capsys.readouterr().out
    assert "000003 cannot be written" in said and full.says in said and "training goes on" in said
    assert "metrics.jsonl cannot be written" in said
    assert [row["iteration"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert [path.name for path in all_checkpoints(tmp_path / "run")] == ["000005", "000002", "000001"]
    assert not [path for path in (tmp_path / "run/checkpoints").iterdir() if path.name.startswith(".")]
    monkeypatch.undo()
    train(out=tmp_path / "whole", iterations=5, **options)
    assert same_tensors(tmp_path / "run/model", tmp_path / "whole/model")


def test_lines_that_cannot_be_appended_are_kept_and_half_of_them_is_taken_back(tmp_path, monkeypatch):
    (tmp_path / "m").write_text("one\n", encoding="utf-8")
    lines = ["two\n"]

    class Half:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            self.file.write(text[:2])
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        plain = Path.open
        patch.setattr(Path, "open", lambda path, *a, **o: Half(plain(path, *a, **o)))
        with pytest.raises(OSError, match="No space"):
            append_lines(tmp_path / "m", lines)
    assert (tmp_path / "m").read_text(encoding="utf-8") == "one\n" and lines == ["two\n"]
    append_lines(tmp_path / "m", lines)
    assert (tmp_path / "m").read_text(encoding="utf-8") == "one\ntwo\n" and lines == []


def test_a_gradient_that_is_not_finite_is_skipped_counted_and_in_the_end_fatal(options, tmp_path, monkeypatch, capsys):
    plain, seen = torch.nn.utils.clip_grad_norm_, []

    def clip(parameters, largest):
        parameters = list(parameters)
        seen.append([p.detach().clone() for p in parameters])
        if len(seen) in bad:
            parameters[0].grad[0] = float("nan") if len(seen) % 2 else float("inf")
        return plain(parameters, largest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    bad = {2, 3}
    train(out=tmp_path / "run", iterations=4, **options)
    rows = metrics(tmp_path / "run")
    assert [row["grad_norm"] is None for row in rows] == [False, True, True, False]
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[3], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    assert "iteration 2: the gradient is not finite" in capsys.readouterr().out
    bad = set(range(len(seen) + 2, 100))
    with pytest.raises(ValueError, match="3 updates in a row .* lower `lr`"):
        train(out=tmp_path / "bad", iterations=9, max_skipped=3, **options)
    held = load_file(newest(tmp_path / "bad")[0] / "tensors.safetensors")
    assert all(value.isfinite().all() for value in held.values())


def test_a_loss_that_is_not_finite_is_skipped_and_counted_also_in_all(options, tmp_path, monkeypatch, capsys):
    plain, calls = speedrl.training.grpo_loss, []

    def loss(*arguments, **how):
        value, stats = plain(*arguments, **how)
        calls.append(value)
        return value + {2: float("nan"), 4: float("inf")}.get(len(calls), 0.0), stats  # whose gradient alone is finite

    monkeypatch.setattr(speedrl.training, "grpo_loss", loss)
    train(out=tmp_path / "run", iterations=3, keep_checkpoints=5, **options)
    train(out=tmp_path / "run", iterations=5, keep_checkpoints=5, resume=True, **options)
    assert len(calls) == 5, "one micro-batch an iteration"
    rows = metrics(tmp_path / "run")
    assert [row["grad_norm"] is None for row in rows] == [False, True, False, True, False]
    record = json.loads((tmp_path / "run/checkpoints/000005/state.json").read_text(encoding="utf-8"))
    assert (record["skipped"], record["skipped_total"]) == (0, 2)
    said = capsys.readouterr().out
    assert all(f"iteration {i}: the gradient is not finite" in said for i in (2, 4))
    held = [load_file(path / "tensors.safetensors") for path in reversed(all_checkpoints(tmp_path / "run"))]
    weights = [{name: value for name, value in part.items() if name.startswith("transformer.")} for part in held]
    moved = [not all(torch.equal(one[name], other[name]) for name in one) for one, other in pairwise(weights)]
    assert moved == [False, True, False, True] and all(v.isfinite().all() for v in weights[-1].values())


def test_a_model_with_an_infinite_weight_ends_in_one_line_and_is_not_trained(options, tiny_generator_folder, tmp_path):
    folder = shutil.copytree(tiny_generator_folder, tmp_path / "infinite")
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["mlm_layer.conv2.weight"].view(-1)[0] = float("inf")
    save_file(weights, path)
    with pytest.raises(ValueError, match="2 updates in a row had a gradient that is not finite"):
        train(out=tmp_path / "run", iterations=5, max_skipped=2, **options | {"model": str(folder)})
    assert all(row["grad_norm"] is None for row in metrics(tmp_path / "run"))


def failing(images, prompts):
    if len(images) > 2:
        raise RuntimeError("the judge\nis ill")
    return blue(images, prompts)


def nan(images, prompts):
    values = blue(images, prompts)
    return values if len(images) == 2 else values / (torch.arange(len(values)) != 1)


def short(images, prompts):
    return blue(images, prompts)[:2]


@pytest.mark.parametrize(
    ("name", "says"),
    [("failing", "fails on 4 images.*the judge"),
     ("nan", "gives inf, not a finite number, for 1 of 4 images, the first of the prompt '. .'"),
     ("short", r"must give a tensor \[4\]")],
)
def test_a_reward_that_fails_later_ends_the_training_in_one_line(options, tmp_path, name, says):
    with pytest.raises((ValueError, OSError), match=says):
        train(out=tmp_path / "run", iterations=2, **options | {"quality": f"tests.test_state:{name}"})


def test_where_memory_runs_out_the_micro_batch_is_halved_and_the_gradient_is_the_same(options, tmp_path, monkeypatch):
    plain, tried = speedrl.training.grpo_loss, []

    def loss(policy, reference, trajectory, *arguments, **how):
        tried.append(len(trajectory))
        value, stats = plain(policy, reference, trajectory, *arguments, **how)
        if len(trajectory) > 3 and sum(tried) > 8:
            value.backward()  # some of the gradient is there when it happens
            raise torch.OutOfMemoryError("CUDA out of memory")
        return value, stats

    options |= {"groups": 4, "group_size": 4, "percentile": 0.0, "min_quality": float("-inf")}  # all samples train
    train(out=tmp_path / "whole", iterations=2, micro_batch=8, **options)
    monkeypatch.setattr(speedrl.training, "grpo_loss", loss)
    train(out=tmp_path / "run", iterations=2, micro_batch=8, **options)
    assert tried == [8, 8, 4, *[2] * 8, *[2] * 8]
    one, other = metrics(tmp_path / "run"), metrics(tmp_path / "whole")
    assert all(row[k] == pytest.approx(o[k], rel=1e-4, abs=1e-6) for row, o in zip(one, other, strict=True) for k in o)
    one, other = (load_file(tmp_path / name / "checkpoints/000001/tensors.safetensors") for name in ("run", "whole"))
    assert all(torch.allclose(one[k], other[k], atol=1e-5) for k in one)


def test_the_average_of_the_weights_follows_them_is_what_is_saved_and_can_be_left_out(options, tmp_path):
    weights = {"w": torch.nn.Parameter(torch.ones(1))}
    learner = Learner(torch.nn.Linear(1, 1), None, None, weights, torch.optim.SGD(weights.values()),
                      {"w": torch.zeros(1)})
    learner.update_average(decay=0.5, updates=0)
    assert learner.average["w"].item() == pytest.approx(0.9)  # a tenth of where it started
    learner.update_average(decay=0.5, updates=100)
    assert learner.average["w"].item() == pytest.approx(0.95)
    train(out=tmp_path / "run", iterations=3, ema=0.8, **options)
    held = load_file(tmp_path / "run/checkpoints/000003/tensors.safetensors")
    export(tmp_path / "run", out=tmp_path / "raw", raw=True)
    saved, raw = (load_generator(tmp_path / name).transformer.state_dict() for name in ("run", "raw"))
    assert all(torch.equal(saved[name], held[f"average.{name}"]) for name in saved)
    assert all(torch.equal(raw[name], held[f"transformer.{name}"]) for name in raw)
    assert not all(torch.equal(raw[name], saved[name]) for name in raw)


def test_a_checkpoint_of_an_unfinished_run_is_exported_as_the_model_that_a_finished_one_saves(options, tmp_path):
    options |= {"lora": 2, "lora_alpha": 4.0, "lora_targets": "to_q,to_v", "lr": 1e-2}
    train(out=tmp_path / "run", iterations=2, **options)
    found = export(tmp_path / "run/checkpoints/000002", out=tmp_path / "out")
    assert found == tmp_path / "out/adapter" and same_tensors(found, tmp_path / "run/adapter")
    config = json.loads((found / "adapter_config.json").read_text(encoding="utf-8"))
    assert config == json.loads((tmp_path / "run/adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert config["lora_alpha"] == 4.0
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"to_q", "to_v"}
    flip(tmp_path / "run/checkpoints/000002/tensors.safetensors")
    with pytest.raises(ValueError, match="is damaged"):
        export(tmp_path / "run/checkpoints/000002", out=tmp_path / "other")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for folder, what in (("out", "a model"), ("run", "a model")):
        with pytest.raises(ValueError, match=f"{folder} holds {what}, which stays: give another `out`"):
            export(tmp_path / "run/checkpoints/000001", out=tmp_path / folder)
    shutil.copytree(tmp_path / "run/checkpoints", tmp_path / "unfinished/checkpoints")
    with pytest.raises(ValueError, match="unfinished holds another run, which stays: give another `out`"):
        export(tmp_path / "run/checkpoints/000001", out=tmp_path / "unfinished")
    with pytest.raises(ValueError, match="out holds a model: use it by `speedrl sample .*`, or give another `out`"):
        train(out=tmp_path / "out", iterations=1, **options)
    assert {path: path.read_bytes() for path in before} == before
    export(tmp_path / "unfinished/checkpoints/000001", out=tmp_path / "unfinished")  # its own
    with pytest.raises(ValueError, match="no linear layer is named 'nothing'"):
        train(out=tmp_path / "next", iterations=1, **options | {"lora_targets": "to_q,nothing"})


def arguments(options, out, iterations, *more):
    """The command line of these options."""
    flags = options | {"iterations": iterations, "out": out}
    del flags["compile"], flags["bf16"]
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in flags.items()]
    return ["train", "--no-compile", "--no-bf16", "--no-compare", *(x for pair in pairs for x in pair), *more]


def wait_for(path, *, seconds=200):
    for _ in range(seconds * 20):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_says_how_to_go_on_and_exits_as_schedulers_expect(options, tmp_path, number, status):
    process = start(command, tmp_path / "log", *arguments(options, tmp_path / "run", 500))
    wait_for(tmp_path / "run/checkpoints/000002")
    os.kill(process.pid, number)
    assert finish([process]) == [status]
    done = len(metrics(tmp_path / "run"))
    assert f"stopped after iteration {done}; go on with the same command and --resume" in (tmp_path / "log").read_text(
        encoding="utf-8"
    )
    assert newest(tmp_path / "run") == (tmp_path / f"run/checkpoints/{done:06d}", [])
    train(out=tmp_path / "run", iterations=done + 1, resume=True, **options)
    train(out=tmp_path / "whole", iterations=done + 1, **options)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert same_tensors(tmp_path / "run/model", tmp_path / "whole/model")


def without_hangups(*given):
    """The command line as nohup starts it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    command(*given)


def test_under_nohup_a_closed_terminal_stops_nothing(options, tmp_path):
    process = start(without_hangups, tmp_path / "log", *arguments(options, tmp_path / "run", 12))
    wait_for(tmp_path / "run/checkpoints/000002")
    os.kill(process.pid, signal.SIGHUP)
    assert finish([process]) == [0] and len(metrics(tmp_path / "run")) == 12


def test_while_a_run_lives_another_is_kept_out_and_after_a_kill_it_goes_on_at_once(options, tmp_path):
    flags = arguments(options, tmp_path / "run", 500, "--resume")
    process = start(command, tmp_path / "log", *flags)
    wait_for(tmp_path / "run/checkpoints/000001")
    for given in (flags, flags[:-1]):
        said = CliRunner().invoke(app, [str(argument) for argument in given])
        assert said.exit_code == 2 and said.stdout == ""
        assert said.stderr.startswith(f"error: {tmp_path / 'run'} is in use by process {process.pid} on ")
        assert said.stderr.endswith(": wait until it ends, or give another --out\n") and said.stderr.count("\n") == 1
    process.kill()
    assert finish([process]) == [-9]
    done = int(newest(tmp_path / "run")[0].name)
    assert (tmp_path / "run/.lock").exists()
    train(out=tmp_path / "run", iterations=done + 1, resume=True, **options)
    assert [row["iteration"] for row in metrics(tmp_path / "run")] == list(range(1, done + 2))
    assert not (tmp_path / "run/.lock").exists()


def holding(path, then):
    with locked(path):
        if os.fork() == 0:  # as a reward's worker, which outlives its parent
            time.sleep(20)
            os._exit(0)
        then.touch()
        time.sleep(200)


def test_a_lock_is_freed_by_its_holders_death_though_its_children_live(tmp_path):
    process = start(holding, tmp_path / "log", tmp_path / ".lock", tmp_path / "then")
    wait_for(tmp_path / "then")
    with pytest.raises(BlockingIOError, match=f"{tmp_path} is in use by process {process.pid} on "), \
            locked(tmp_path / ".lock"):
        pass
    process.kill()
    finish([process])
    with locked(tmp_path / ".lock") as missing:
        assert missing is None


def test_a_file_system_without_locks_is_a_warning(options, tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", lockf)
    train(out=tmp_path / "run", iterations=1, **options)
    said = capsys.readouterr().out
    assert f"warning: nothing keeps another training out of {tmp_path / 'run'}: " in said and "No locks" in said
    assert not (tmp_path / "run/.lock").exists()


def test_a_signal_during_the_search_stops_it_and_the_same_command_starts_again(options, tmp_path, monkeypatch):
    plain, drawn = speedrl.generation.sample, []

    def interrupted(*arguments, **how):
        drawn.append(1)
        if len(drawn) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*arguments, **how)

    monkeypatch.setattr(speedrl.generation, "sample", interrupted)
    again = options | {"search": 8, "iterations": 1}
    with pytest.raises(Stopped, match="before the first iteration") as found:
        train(out=tmp_path / "run", **again)
    assert found.value.status == 130 and len(drawn) == 2
    assert train(out=tmp_path / "run", **again).exists()


KILLS = int(os.environ.get("SPEEDRL_KILLS", "3"))  # 50 for the long test


def test_killed_at_random_moments_a_run_ends_as_the_uninterrupted_one(options, tmp_path):
    chance, iterations, done = random.Random(0), 3 + 6 * KILLS, 0
    flags = arguments(options, tmp_path / "run", iterations, "--resume")
    for _ in range(KILLS):
        process = start(command, tmp_path / "log", *flags)
        wait_for(tmp_path / f"run/checkpoints/{done + 1:06d}")
        time.sleep(chance.random() * 0.2)
        process.kill()
        assert finish([process]) in ([-9], [0])
        assert newest(tmp_path / "run")[1] == []
        done = int(newest(tmp_path / "run")[0].name)
        if done == iterations:
            break
    train(out=tmp_path / "run", iterations=iterations, resume=True, **options)
    train(out=tmp_path / "whole", iterations=iterations, **options)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert same_tensors(tmp_path / "run/model", tmp_path / "whole/model")
    assert not (tmp_path / f"run/checkpoints/.{iterations:06d}.partial").exists()


def test_a_stop_whose_state_cannot_be_written_says_what_is_saved(options, tmp_path, monkeypatch):
    full = Full(monkeypatch, tmp_path / "run")
    plain = speedrl.training.decode

    def decode(*a, **options):
        if (tmp_path / "run/checkpoints/000002").exists():
            full.now = True
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*a, **options)

    monkeypatch.setattr(speedrl.training, "decode", decode)
    with pytest.raises(Stopped, match="stopped after iteration 3, of which 2 saved; go on") as stopped:
        train(out=tmp_path / "run", iterations=9, **options)
    assert stopped.value.status == 143


def refused(options, out):
    """What the command line says of a folder that it cannot write."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments(options, out, 1)])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit) and result.stdout == ""
    assert result.stderr.startswith(f"error: {out} cannot be written (") and result.stderr.count("\n") == 1
    assert result.stderr.endswith("): choose another --out\n")
    return result.stderr


def test_a_folder_that_cannot_be_made_is_one_line(options, tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert "Not a directory" in refused(options, tmp_path / "file/run")
    assert "File exists" in refused(options, tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "x"


def test_a_read_only_folder_is_one_line_before_anything_is_computed(options, tmp_path):
    need_permissions(tmp_path)
    (tmp_path / "run").mkdir(mode=0o555)
    for out in (tmp_path / "run", tmp_path / "run/below"):
        assert "Permission denied" in refused(options, out)
    assert not any((tmp_path / "run").iterdir())


def test_where_the_model_cannot_be_saved_it_is_said_what_stands_and_resuming_saves_it(options, run, tmp_path, capsys):
    """The system itself refuses files over 50 kB."""
    resource = pytest.importorskip("resource")
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), shutil.copytree(run / "model", tmp_path / "before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="model cannot be saved .*; the checkpoint of iteration 3 stands: mend that"):
            train(out=run, iterations=4, resume=True, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "000004 cannot be written" in capsys.readouterr().out
    assert same_tensors(run / "model", before) and newest(run) == (run / "checkpoints/000003", [])
    train(out=run, iterations=4, resume=True, **options)
    train(out=tmp_path / "whole", iterations=4, **options)
    assert metrics(run) == metrics(tmp_path / "whole") and same_tensors(run / "model", tmp_path / "whole/model")


def test_trackers_get_every_row_and_one_that_fails_stops_nothing(options, tmp_path, monkeypatch, capsys):
    import speedrl.run.trackers

    seen = []

    def broken(out, settings, *, resume):
        def track(row):
            seen.append(row["iteration"])
            raise ConnectionError("offline")

        return track

    monkeypatch.setitem(speedrl.run.trackers.TRACKERS, "wandb", broken)
    train(out=tmp_path / "run", iterations=2, trackers=["tensorboard", "wandb"], **options)
    assert seen == [1] and capsys.readouterr().out.count("the tracker wandb fails and is left out (offline)") == 1
    with pytest.raises(ValueError, match="`trackers` must be tensorboard, wandb, got 'paper'"):
        train(out=tmp_path / "none", iterations=1, trackers=["paper"], **options)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    written = [(e.step, e.value) for e in events.Scalars("reward")]
    assert written == [(row["iteration"], pytest.approx(row["reward"])) for row in metrics(tmp_path / "run")]
