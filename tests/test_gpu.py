"""On a GPU: a training is the processor's, ranks over NCCL are as one, and where memory really runs out less does."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from speedrl.generation import make_policy
from speedrl.method.divergences import ce_kl
from speedrl.method.ratios import token_events
from speedrl.method.sampler import Sampler
from speedrl.method.sampling import draw_noise, rollout
from speedrl.method.scoring import visited_steps
from speedrl.models.loading import load_generator
from speedrl.system.memory import MicroBatches
from speedrl.training import grpo_loss, train
from tests.ranks import finish, free_port, one
from tests.test_distributed import OPTIONS, close, keep_gradient, rows, trained

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and there is none")
DEVICE, LENGTH = "cuda", 16


def without_tf32(put=setattr):
    """TF32, by default convolutions', off, as bf16 is by the options: what then differs from the processor is the order
    of sums."""
    put(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def options(tiny_generator_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a b\nc d\ne f\ng h\ni j\n", encoding="utf-8")
    return OPTIONS | {"model": str(tiny_generator_folder), "prompts": str(tmp_path / "prompts.txt"),
                      "quality": "tests.test_distributed:green"}


@pytest.mark.parametrize("how", [{"likelihood": "exact"}, {"likelihood": "token"}, {"hindsight": 1.0}], ids=str)
def test_an_iteration_gives_the_gradient_and_the_metrics_of_the_processor(options, tmp_path, monkeypatch, how):
    without_tf32(monkeypatch.setattr)
    for device in ("cpu", DEVICE):
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", torch.optim.AdamW.step)  # to be put back
            keep_gradient(tmp_path / f"{device}.st")
            train(out=tmp_path / device, device=device, **options | how)
    (here,), (there,) = rows(tmp_path / "cpu"), rows(tmp_path / DEVICE)
    assert here.keys() == there.keys() and here["grad_norm"] > 1e-3
    assert all(there[name] == pytest.approx(here[name], rel=1e-3, abs=1e-5) for name in here)
    assert close(load_file(tmp_path / f"{DEVICE}.st"), load_file(tmp_path / "cpu.st"), to=1e-4)


def test_in_the_precision_of_the_device_a_run_is_saved_and_goes_on(options, tmp_path):
    """bf16, so metrics are only near; the device's random states are in the checkpoint."""
    options |= {"device": DEVICE, "save_every": 1, "bf16": None}
    train(out=tmp_path / "run", **options)
    assert f"0.{DEVICE}" in load_file(tmp_path / "run/checkpoints/000001/random.st")
    train(out=tmp_path / "run", **options | {"iterations": 2, "resume": True})
    found = rows(tmp_path / "run")
    assert [row["iteration"] for row in found] == [1, 2]
    assert all(row["grad_norm"] is not None and row["kept"] > 0 for row in found)
    record = json.loads((tmp_path / "run/checkpoints/000002/state.json").read_text(encoding="utf-8"))
    assert record["settings"]["device"] == DEVICE
    saved = load_generator(tmp_path / "run", device=DEVICE).transformer.state_dict()
    assert all(value.isfinite().all() for value in saved.values())


def trained_in_float32(out, options):
    without_tf32()
    trained(out, options)


def spawned(work, world, folder, *arguments):
    """As `start_ranks`, in new processes: a GPU cannot be used in forked ones."""
    port, started, processes = free_port(), [], multiprocessing.get_context("spawn")
    for rank in range(world):
        given = (work, rank, world, port, str(folder / f"rank-{rank}.log"), arguments)
        started.append(processes.Process(target=one, args=given))
        started[-1].start()
    return started


@pytest.mark.parametrize(
    ("world", "how"), [(1, {"parallel": "fsdp"}), (1, {"parallel": "fsdp", "offload": True}), (2, {}),
                       (2, {"parallel": "fsdp"}), (2, {"parallel": "fsdp", "lora": 2})],
)
def test_ranks_give_the_gradient_and_the_metrics_of_one(options, tmp_path, world, how):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    options |= {"device": DEVICE}
    alone = {name: value for name, value in how.items() if name == "lora"}
    for name, count, more in (("one", 1, alone), ("ranks", world, how)):
        started = spawned(trained_in_float32, count, tmp_path, str(tmp_path / name), options | more)
        assert finish(started) == [0] * count, (tmp_path / "rank-0.log").read_text(encoding="utf-8")
    (one,), (other,) = rows(tmp_path / "one"), rows(tmp_path / "ranks")
    assert one.keys() == other.keys() and one["grad_norm"] > 1e-3
    assert all(other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5) for name in one)
    assert close(load_file(tmp_path / "ranks-0.st"), load_file(tmp_path / "one-0.st"), to=1e-4)
    assert list(Path(tmp_path / "ranks").rglob("*model*.safetensors"))


def reserved(run):
    """The most bytes that the device keeps for run()."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_reserved()


def short_of_memory(run, size):
    """run(size), fitted to half of what it takes at `size` and more than at a sixteenth."""
    least, most = reserved(lambda: run(size // 16)), reserved(lambda: run(size))
    assert most > 2 * least + 2**26, "the allocator gives memory out in pieces of up to 20 MB"
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((least + most) / 2 / torch.cuda.get_device_properties(0).total_memory)
    try:
        return run(size)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_where_the_devices_memory_runs_out_smaller_batches_give_the_same_gradient(tiny_generator_folder, monkeypatch):
    without_tf32(monkeypatch.setattr)
    count, generator = 1024, load_generator(tiny_generator_folder, device=DEVICE)
    policy = make_policy(generator, ["an owl"] * count, guidance=1.0)
    steps, noise = torch.full((count,), 4, device=DEVICE), draw_noise(count, 4, LENGTH, seed=0, device=DEVICE)
    trajectory = rollout(policy, steps, noise, Sampler())
    which, keep = visited_steps(steps), torch.ones(count, device=DEVICE)
    advantages = torch.linspace(-1, 1, count, device=DEVICE)
    learned = [p for p in generator.transformer.parameters() if p.requires_grad]

    def update(size):
        undo = torch.optim.SGD(learned).zero_grad
        undo()
        batches = MicroBatches(size, undo=undo)
        for index in batches.over(torch.arange(count, device=DEVICE)):
            with batches:
                loss, stats = grpo_loss(policy[index], None, trajectory[index], advantages[index], keep[index],
                                        which[index], likelihood=token_events, kl=ce_kl, kl_weight=0.0)
                (loss / (count * LENGTH)).backward()
                batches.add(stats)
        return [p.grad.clone() for p in learned if p.grad is not None], batches

    expected, whole = update(count)
    found, batches = short_of_memory(update, count)
    assert 1 <= batches.size < whole.size == count
    assert batches.totals == pytest.approx(whole.totals, rel=1e-4, abs=1e-3)
    largest = max(value.abs().max() for value in expected)
    assert largest > 0
    for one_found, one_expected in zip(found, expected, strict=True):
        torch.testing.assert_close(one_found, one_expected, rtol=1e-4, atol=1e-4 * largest.item())
