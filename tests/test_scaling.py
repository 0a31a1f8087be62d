"""The plan for many GPUs holds for the small models that fit here."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from experiments.bench.flops import forward_flops
from experiments.bench.scaling import communication, memory, picture_flops, plan, table, throughput
from speedrl.models.lora import add_lora
from speedrl.models.meissonic import MeissonicTransformer
from speedrl.run.distributed import shard
from tests.conftest import TRANSFORMER


def held(transformer, optimizer):
    """Bytes of this process's weights, gradients and optimizer states, measured."""
    local = lambda t: t.to_local() if hasattr(t, "to_local") else t  # noqa: E731
    size = lambda tensors: sum(local(t).nbytes for t in tensors if t is not None and t.ndim)  # noqa: E731
    parameters = list(transformer.parameters())
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {"weights": size(parameters), "gradients": size(p.grad for p in parameters), "optimizer": size(states)}


def stepped(transformer):
    """An optimizer after one step on gradients of ones."""
    learned = [p for p in transformer.parameters() if p.requires_grad]
    for p in learned:
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW(learned)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("rank", [None, 2])
def test_memory_of_all_weights_and_of_an_adapter_is_what_is_measured(rank):
    transformer = MeissonicTransformer(**TRANSFORMER)
    size = sum(p.numel() for p in transformer.parameters())
    if rank:
        pytest.importorskip("peft")
        add_lora(transformer, rank=rank)
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    expected = memory(size, trained=trained if rank else None)
    measured = held(transformer, stepped(transformer))
    assert measured == {name: expected[name] for name in measured}
    assert expected["reference"] == (0 if rank else 4 * size)  # a copy, or the base under the adapter
    assert memory(size, ema=True)["average"] == 4 * size and expected["gathered"] == 0


def test_memory_of_a_sharded_model_is_what_is_measured():
    """One rank of four, whose messages go nowhere: sharding alone is measured."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        transformer = MeissonicTransformer(**TRANSFORMER)
        size = sum(p.numel() for p in transformer.parameters())
        shard(transformer, device="cpu")
        measured = held(transformer, stepped(transformer))
    finally:
        dist.destroy_process_group()
    expected = memory(size, ranks=4, parallel="fsdp", gathered_bytes=4)
    assert expected["gathered"] == 4 * size and expected["reference"] == size
    for name, value in measured.items():  # dimensions that four do not divide are cut unevenly
        assert value == pytest.approx(expected[name], rel=0.02)
    offloaded = memory(size, ranks=4, parallel="fsdp", offload=True, frozen=10)
    assert sum(offloaded.values()) == 2 * size + 40


def test_communication_counts_what_each_rank_sends():
    assert communication(100, ranks=2) == 2 * 0.5 * 400 and communication(100, ranks=1) == 0
    assert communication(100, ranks=4, trained=10, updates=3) == 3 * 2 * 0.75 * 40
    assert communication(100, ranks=2, parallel="fsdp", micro_batches=2) == 0.5 * (200 + 2 * (3 * 200 + 400))
    assert communication(100, ranks=2, parallel="fsdp", reference=False) == 0.5 * (200 + 2 * 200 + 400)


def test_operations_of_a_picture_are_those_of_its_calls():
    network, shape = MeissonicTransformer(**TRANSFORMER), {"grid": (4, 4), "text": 8}
    whole = forward_flops(network, batch=1, **shape)
    assert picture_flops(network, steps=1, **shape) == (whole, 4 * whole)
    assert picture_flops(network, steps=1, guidance=2.0, reference=False, **shape) == (2 * whole, 6 * whole)
    sampling, training = picture_flops(network, steps=4, **shape)
    body = forward_flops(network, batch=1, places=0, **shape)
    assert 4 * body < sampling < 4 * whole  # the head at all places at first, at few in the end
    assert training == 4 * (4 * body + whole - body)  # at each place once
    assert picture_flops(network, steps=4, trained=2, **shape) == (sampling, training / 2)


def test_throughput_is_that_of_the_work_and_of_what_is_sent():
    assert throughput(10.0, rate=100.0) == 10
    assert throughput(10.0, rate=100.0, pictures=5, sent=50.0, bandwidth=100.0) == 5


def test_the_page_has_the_tables_that_the_calculator_makes():
    page = (Path(__file__).parent.parent / "docs/scaling.md").read_text(encoding="utf-8")
    assert table() in page and plan() in page
