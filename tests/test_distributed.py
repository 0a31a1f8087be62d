"""Ranks on the processor, over gloo: however many there are, the samples, the gradient and the metrics are the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import speedrl.training
from speedrl.run.checkpoints import newest
from speedrl.run.distributed import all_gather_object, gathered, join, local_slice, total, total_stats
from speedrl.run.exporting import export
from speedrl.training import train
from tests.ranks import command, finish, free_port, start, start_ranks
from tests.test_state import arguments, wait_for

OPTIONS = dict(steps="2-4", groups=4, group_size=3, iterations=1, compile=False, bf16=False, lr=1e-3, micro_batch=5,
               percentile=60.0, updates=1, search=0, quality="embedded")


def green(images, prompts):
    return images[:, 1].mean((1, 2)) + 0.1 * images[:, 0].mean((1, 2))


@pytest.fixture
def options(tiny_generator_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a b\nc d\ne f\ng h\ni j\n", encoding="utf-8")
    return OPTIONS | {"model": str(tiny_generator_folder), "prompts": str(tmp_path / "prompts.txt"),
                      "quality": "tests.test_distributed:green"}


def keep_gradient(path):
    """Has the optimizer's step write the gradient that it gets, whole, before it takes it."""
    plain = torch.optim.AdamW.step

    def step(self, *_, **__):
        found = [p.grad for group in self.param_groups for p in group["params"]]
        found = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]
        if all_gather_object(None) and not path.exists():
            save_file({str(i): g.contiguous().clone() for i, g in enumerate(found)}, path)
        return plain(self)

    torch.optim.AdamW.step = step


def trained(out, options):
    keep_gradient(Path(out).with_name(f"{Path(out).name}-{os.environ['RANK']}.st"))
    train(out=out, **options)


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    timed = ("images_per_second", "compile_seconds")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def close(one, other, *, to=1e-5):
    return all(torch.allclose(one[k], other[k], atol=to * max(1, other[k].abs().max().item())) for k in other)


def test_the_gradient_and_the_metrics_do_not_depend_on_the_number_of_ranks(options, tmp_path):
    """The percentile filters whole groups, and with 4 ranks one rank or more has none that trains."""
    for world, more in ((1, {}), (2, {}), (4, {}), (2, {"parallel": "fsdp"})):
        name = f"{more.get('parallel', 'ddp')}-{world}"
        statuses = finish(start_ranks(trained, world, tmp_path, str(tmp_path / name), options | more))
        assert statuses == [0] * world, (tmp_path / "rank-0.log").read_text(encoding="utf-8")
    alone, one = load_file(tmp_path / "ddp-1-0.st"), rows(tmp_path / "ddp-1")
    assert 0 < one[0]["kept"] < 1 and max(g.abs().max() for g in alone.values()) > 1e-3
    for name in ("ddp-2", "ddp-4", "fsdp-2"):
        other = rows(tmp_path / name)
        assert other[0].keys() == one[0].keys()
        assert all(other[0][key] == pytest.approx(one[0][key], rel=1e-4, abs=1e-6) for key in one[0])
        assert close(load_file(tmp_path / f"{name}-0.st"), alone)
        model = "model/transformer/diffusion_pytorch_model.safetensors"
        assert load_file(tmp_path / name / model).keys() == load_file(tmp_path / "ddp-1" / model).keys()
    assert (
        "iteration" in (tmp_path / "rank-0.log").read_text(encoding="utf-8")
        and (tmp_path / "rank-1.log").read_text(encoding="utf-8") == ""
    )


def test_the_step_policy_and_its_gradient_do_not_depend_on_the_number_of_ranks(options, tmp_path):
    options |= {"steps": "1-4", "steps_reward": 0.5, "search": 1, "save_every": 1}
    for world, more in ((1, {}), (2, {}), (2, {"parallel": "fsdp"})):
        name = f"{more.get('parallel', 'ddp')}-{world}"
        statuses = finish(start_ranks(trained, world, tmp_path, str(tmp_path / name), options | more))
        assert statuses == [0] * world, (tmp_path / "rank-0.log").read_text(encoding="utf-8")
    alone, one = load_file(tmp_path / "ddp-1-0.st"), rows(tmp_path / "ddp-1")
    assert 1 < one[0]["steps"] < 4 and max(g.abs().max() for g in alone.values()) > 1e-3
    sampler = "model/scheduler/sampler.safetensors"
    wanted = load_file(tmp_path / "ddp-1" / sampler)
    assert wanted["steps.bias"].abs().max() > 0
    for name in ("ddp-2", "fsdp-2"):
        other = rows(tmp_path / name)
        assert all(other[0][key] == pytest.approx(one[0][key], rel=1e-3, abs=1e-5) for key in one[0])
        assert close(load_file(tmp_path / f"{name}-0.st"), alone, to=1e-4)
        assert close(load_file(tmp_path / name / sampler), wanted, to=1e-4)
    exported = export(tmp_path / "fsdp-2", out=tmp_path / "out")
    found, saved = (load_file(path / sampler.partition("/")[2]) for path in (exported, tmp_path / "fsdp-2/model"))
    assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)


def resumed(out, options, first, last):
    train(out=out, **options | {"iterations": last, "resume": first})


def on_ranks(world, folder, *given):
    assert finish(start_ranks(resumed, world, folder.parent, str(folder), *given)) == [0] * world, (
        folder.parent / "rank-0.log"
    ).read_text(encoding="utf-8")


def near(one, other):
    """Whether two runs' metrics are the same but for the order of sums."""
    assert len(one) == len(other) and all(a.keys() == b.keys() for a, b in zip(one, other, strict=True))
    return all(a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-6) for a, b in zip(one, other, strict=True) for k in a)


@pytest.mark.parametrize("how", [{"lora": 2}, {"parallel": "fsdp"}])
def test_ranks_resume_exactly_and_another_number_of_ranks_goes_on_as_they_would_have(options, tmp_path, how):
    options |= {"ema": 0.9, "save_every": 1} | how
    on_ranks(2, tmp_path / "whole", options, False, 3)
    on_ranks(2, tmp_path / "parts", options, False, 2)
    shutil.copytree(tmp_path / "parts", tmp_path / "fewer")
    on_ranks(2, tmp_path / "parts", options, True, 3)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    saved = "adapter" if "lora" in how else "model"
    found = list((tmp_path / "whole" / saved).rglob("*.safetensors"))
    assert found
    for path in found:
        one, other = load_file(path), load_file(tmp_path / "parts" / path.relative_to(tmp_path / "whole"))
        assert all(torch.equal(one[name], other[name]) for name in one)
    alone = options | {"parallel": "ddp", "iterations": 3}
    train(out=tmp_path / "fewer", **alone | {"resume": True})
    assert near(rows(tmp_path / "fewer"), rows(tmp_path / "whole")) and rows(tmp_path / "whole")[2]["grad_norm"] > 1e-3
    train(out=tmp_path / "alone", **alone)
    shutil.copytree(tmp_path / "alone", tmp_path / "more")
    shutil.rmtree(tmp_path / "more/checkpoints/000003")
    on_ranks(2, tmp_path / "more", options, True, 3)
    assert rows(tmp_path / "more")[:2] == rows(tmp_path / "alone")[:2]
    assert near(rows(tmp_path / "more"), rows(tmp_path / "alone"))


@pytest.mark.parametrize("how", [{"lora": 2}, {"checkpointing": True}, {"offload": True}], ids=str)
def test_shards_with_an_adapter_recomputed_or_offloaded_train_as_one_process(options, tmp_path, how):
    """Two iterations: the second has the optimizer's step on shards behind it, and an adapter that is not nothing."""
    options |= {"iterations": 2, "lr": 1e-3}
    alone = {name: value for name, value in how.items() if name == "lora"}
    for name, world, more in (("one", 1, alone), ("ranks", 2, {"parallel": "fsdp"} | how)):
        statuses = finish(start_ranks(trained, world, tmp_path, str(tmp_path / name), options | more))
        assert statuses == [0] * world, (tmp_path / "rank-0.log").read_text(encoding="utf-8")
    assert near(rows(tmp_path / "ranks"), rows(tmp_path / "one"))
    assert close(load_file(tmp_path / "ranks-0.st"), load_file(tmp_path / "one-0.st"))
    saved = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*odel*.safetensors"))
    assert len(saved) >= 1 + 2 * ("lora" not in how)
    for path in saved:
        assert close(load_file(tmp_path / "ranks" / path), load_file(tmp_path / "one" / path), to=1e-4), path


@pytest.mark.parametrize("told", [(0, 1), (1,)], ids=["both", "one"])
def test_ranks_that_are_told_to_stop_end_the_same_iteration_save_it_and_say_so(options, tmp_path, told):
    flags = arguments(options | {"save_every": 2}, tmp_path / "run", 500)
    processes = start_ranks(command, 2, tmp_path, *flags)
    wait_for(tmp_path / "run/checkpoints/000002")
    for rank in told:
        os.kill(processes[rank].pid, signal.SIGTERM)
    assert finish(processes) == [143, 143]
    done = len(rows(tmp_path / "run"))
    for rank in (0, 1):
        said = (tmp_path / f"rank-{rank}.log").read_text(encoding="utf-8")
        assert f"stopped after iteration {done}; go on with the same command and --resume" in said
    assert newest(tmp_path / "run") == (tmp_path / f"run/checkpoints/{done:06d}", [])


def test_the_ranks_of_a_run_share_its_folder_and_those_of_another_are_all_kept_out(options, tmp_path):
    options |= {"save_every": 1}
    process = start(command, tmp_path / "log", *arguments(options, tmp_path / "run", 500))
    wait_for(tmp_path / "run/checkpoints/000001")
    given = options | {"resume": True}
    try:
        assert finish(start_ranks(cannot, 2, tmp_path, str(tmp_path / "run"), given)) == [2, 2]
    finally:
        process.kill()
    finish([process])
    for rank in (0, 1):
        said = (tmp_path / f"rank-{rank}.log").read_text(encoding="utf-8")
        assert f"error: {tmp_path / 'run'} is in use by process {process.pid} on " in said
    done = int(newest(tmp_path / "run")[0].name)
    assert finish(start_ranks(cannot, 2, tmp_path, str(tmp_path / "run"), given | {"iterations": done + 1})) == [0, 0]


def deadly(images, prompts):
    """Kills rank 1 in the third iteration, unless torchrun has started it again."""
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if first and os.environ["RANK"] == "1" and Path("run/checkpoints/000002").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return green(images, prompts)


def test_torchrun_starts_killed_ranks_again_which_resume_and_stops_them_in_good_order(options, tmp_path):
    """The command of the README. A rank is killed, all start again and go on; then torchrun is told to stop."""
    options |= {"quality": "tests.test_distributed:deadly", "save_every": 1}
    flags = [str(flag) for flag in arguments(options, "run", 500, "--resume")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    where = {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*torchrun, "--master-port", str(free_port()), "-m", "speedrl", *flags], cwd=tmp_path, stdout=log,
            stderr=log, env=os.environ | where,
        )
    try:
        wait_for(tmp_path / "run/checkpoints/000004")
        process.terminate()
        assert process.wait(120) != 0
    finally:
        process.kill()
    said, found = (tmp_path / "log").read_text(encoding="utf-8"), rows(tmp_path / "run")
    done = len(found)
    assert (tmp_path / "killed").exists(), "rank 1 was killed, and only ranks that torchrun starts again live on"
    assert [row["iteration"] for row in found] == list(range(1, done + 1))
    assert said.count("iteration 2  reward") == said.count("iteration 3  reward") == 1, "it went on from the second"
    assert said.count(f"stopped after iteration {done}; go on with the same command and --resume") == 2
    assert newest(tmp_path / "run") == (tmp_path / f"run/checkpoints/{done:06d}", [])
    on_ranks(2, tmp_path / "run", options, True, done + 1)
    on_ranks(2, tmp_path / "whole", options, False, done + 1)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    for path in (tmp_path / "whole/model").rglob("*.safetensors"):
        one, other = load_file(path), load_file(tmp_path / "run" / path.relative_to(tmp_path / "whole"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def joins_again(port, attempt):
    """As torchrun starts a rank, with the store that torchrun has kept; rank 1 comes late the second time."""
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                   "TORCHELASTIC_RESTART_COUNT": str(attempt)}
    if attempt and os.environ["RANK"] == "1":
        time.sleep(2)
    join("cpu", minutes=1)
    print(all_gather_object(os.environ["RANK"]))


def test_ranks_that_torchrun_starts_again_do_not_look_for_those_that_are_gone(tmp_path):
    store = torch.distributed.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    for attempt in range(2):
        statuses = finish(start_ranks(joins_again, 2, tmp_path, store.port, attempt))
        said = (tmp_path / "rank-0.log").read_text(encoding="utf-8")
        assert statuses == [0, 0] and said == "['0', '1']\n", said


def joins_alone(attempt):
    os.environ |= {"WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": str(attempt)}
    with pytest.raises(ConnectionError, match="rank 0 did not find the others: Timed out"):
        join("cpu", minutes=0.02)


@pytest.mark.parametrize("attempt", [0, 1])
def test_a_rank_that_does_not_find_the_others_says_so_in_time(tmp_path, attempt):
    statuses = finish(start_ranks(joins_alone, 1, tmp_path, attempt))
    assert statuses == [0], (tmp_path / "rank-0.log").read_text(encoding="utf-8")


def dies(out, options):
    """Rank 1 is killed in the middle of the second iteration."""
    plain = speedrl.training.decode

    def decode(*arguments, **options):
        if os.environ["RANK"] == "1" and (Path(out) / "checkpoints/000001").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments, **options)

    speedrl.training.decode = decode
    cannot(out, options | {"iterations": 50, "save_every": 1})


def test_where_a_rank_is_killed_the_others_stop_and_say_why(options, tmp_path):
    began = time.monotonic()
    processes = start_ranks(dies, 2, tmp_path, str(tmp_path / "run"), options)
    assert finish(processes) == [2, -9]
    assert time.monotonic() - began < 200  # far below the limit of ten minutes, on a busy machine too
    assert "rank 0 of 2 lost contact" in (tmp_path / "rank-0.log").read_text(encoding="utf-8")
    assert (tmp_path / "run/checkpoints/000001/manifest.json").exists()


def cannot(out, options):
    """A training that fails, as the command line ends it."""
    try:
        train(out=out, **options)
    except (ValueError, OSError) as error:
        print("error:", error)
        sys.exit(2)


def half(images, prompts):
    """NaN on one rank only."""
    bad = os.environ.get("RANK") == "1" and len(images) > 2
    return images.mean((1, 2, 3)) * (float("nan") if bad else 1)


def test_what_goes_wrong_on_one_rank_stops_all_with_the_reason(options, tmp_path):
    options |= {"quality": "tests.test_distributed:half"}
    assert finish(start_ranks(cannot, 2, tmp_path, str(tmp_path / "nan"), options)) == [2, 2]
    logs = [(tmp_path / f"rank-{rank}.log").read_text(encoding="utf-8") for rank in (0, 1)]
    assert all("gives nan, not a finite number, for 32 of 32 images" in log for log in logs)
    assert finish(start_ranks(cannot, 2, tmp_path, str(tmp_path / "odd"), options | {"groups": 3})) == [2, 2]
    assert "`groups` 3 cannot be shared by 2 ranks: give a multiple of 2" in (tmp_path / "rank-0.log").read_text(
        encoding="utf-8"
    )


def test_one_process_is_the_only_rank(options, tmp_path):
    values = torch.arange(6.0).view(3, 2)
    assert gathered(values) is values and torch.equal(total(values), values) and total(values) is not values
    assert local_slice(5) == slice(0, 5) and all_gather_object("a") == ["a"]
    assert total_stats({"a": 2.0, "b_max": 3.0}) == {"a": 2.0, "b_max": 3.0}
    with pytest.raises(ValueError, match="torchrun"):
        train(out=tmp_path / "run", **options | {"parallel": "fsdp"})
    with pytest.raises(ValueError, match="parallel"):
        train(out=tmp_path / "run", **options | {"parallel": "horovod"})
    assert not (tmp_path / "run").exists()
