"""Ranks: the processes that torchrun starts share an iteration's samples and agree on everything else.

Each rank has whole groups of samples. Rewards are gathered, so that every rank computes the same advantages, filters
and statistics from all of them; gradients are summed. In a process of its own each function here is the identity.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from speedrl.models.meissonic import MeissonicTransformer
from speedrl.system.errors import one_line


def rank() -> int:
    """This process's place among the ranks; 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this rank is the one that prints and writes."""
    return rank() == 0


def world() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join(device: torch.device | str, *, parallel: str = "ddp", minutes: float = 10) -> str:
    """Joins the ranks that torchrun started, if it did; returns this rank's own device.

    gloo between processors, NCCL between GPUs. A rank that waits longer than `minutes` for another stops. ValueError
    for an unknown `parallel`, and for "fsdp" without torchrun, whose world it needs; ConnectionError where the ranks do
    not find each other.
    """
    if parallel not in ("ddp", "fsdp"):
        raise ValueError(f"`parallel` must be ddp or fsdp, got {parallel!r}")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`device` {device} cannot be used: {one_line(error)}") from error
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        patience = timedelta(minutes=minutes)
        try:
            dist.init_process_group(backend, timeout=patience, **meeting_point(patience))
        except RuntimeError as error:
            raise ConnectionError(f"rank {os.environ['RANK']} did not find the others: {one_line(error)}") from error
    if parallel == "fsdp" and not dist.is_initialized():
        raise ValueError("`parallel` fsdp needs ranks: start with torchrun --nproc-per-node N -m speedrl train")
    return str(device)


def meeting_point(timeout: timedelta) -> dict[str, Any]:
    """Where the ranks look for each other, and for how long, as arguments of init_process_group.

    On one node torchrun keeps one store through its restarts, with the addresses of ranks that are gone, so each
    attempt has keys of its own. On several nodes, which count restarts apart, its c10d rendezvous makes a new store.
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if not restarts or int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        return {}
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    return {"store": dist.PrefixStore(f"attempt-{restarts}", store), "rank": rank, "world_size": world_size}


def leave() -> None:
    """Leaves the ranks, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def lost_contact() -> Iterator[None]:
    """Within, a rank that dies is a ConnectionError of one line on the others."""
    try:
        yield
    except RuntimeError as error:
        if world() > 1 and any(word in str(error) for word in ("gloo", "NCCL", "Connection", "timed out", "Timeout")):
            what = f"rank {rank()} of {world()} lost contact with another: {one_line(error)}"
            raise ConnectionError(what) from error
        raise


def local_slice(count: int, *, times: int = 1) -> slice:
    """This rank's part of `count` groups of `times` samples, as a slice of the samples.

    ValueError where ranks would get different numbers of groups.
    """
    if count % world():
        raise ValueError(f"`groups` {count} cannot be shared by {world()} ranks: give a multiple of {world()}")
    each = count // world() * times
    return slice(rank() * each, (rank() + 1) * each)


def gathered(values: Tensor) -> Tensor:
    """[n, ...] of each rank -> [world * n, ...] of all, in their order, on every rank."""
    if world() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def gathered_parts(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`gathered` of each tensor by name."""
    return {name: gathered(part) for name, part in parts.items()}


def total(values: Tensor, *, largest: bool = False) -> Tensor:
    """The sum over ranks, or the largest, elementwise: a new tensor, the same on every rank."""
    values = values.clone()
    if world() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return values


def all_gather_object(value: Any) -> list[Any]:
    """A picklable value of each rank, by rank."""
    values = [value]
    if world() > 1:
        values *= world()
        dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits for all ranks."""
    all_gather_object(None)


def on_all_ranks(act: Callable[[], Any] | None) -> Any:
    """Acts, where there is something to do, and waits for all ranks. OSError on every rank where any of them failed."""
    result, failed = None, None
    try:
        result = act() if act else None
    except Exception as error:  # whatever it is, the others must not wait for ever
        failed = one_line(error)
    if why := next((said for said in all_gather_object(failed) if said), None):
        raise OSError(why)
    return result


def total_stats(stats: Mapping[str, float]) -> dict[str, float]:
    """Statistics of each rank as those of all: the largest of names ending in _max, the sum of the others."""
    names = sorted(stats)
    values = torch.tensor([stats[name] for name in names], dtype=torch.float64)
    sums, most = total(values).tolist(), total(values, largest=True).tolist()
    return {name: most[i] if name.endswith("_max") else sums[i] for i, name in enumerate(names)}


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Sums the gradients over ranks, in place; a rank without one takes part with zeros.

    After all micro-batches, so that ranks may differ in their number, as after running out of memory. Gradients that
    FSDP has sharded are summed already.
    """
    if world() == 1:
        return
    waiting = []
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if not hasattr(p.grad, "full_tensor"):
            waiting.append(dist.all_reduce(p.grad, async_op=True))
    for work in waiting:
        work.wait()


def shard(transformer: nn.Module, *, device: torch.device | str, offload: bool = False, bf16: bool = False) -> None:
    """Shards a transformer's weights over the ranks, block by block, in place (FSDP2, arXiv 2304.11277).

    On a GPU with `bf16`, weights are gathered in it and gradients summed in float32; with `offload` they stay in the
    processor's memory between uses. Gradients are sums over ranks, as `sum_gradients` makes them. It is called through
    `features` and `head` from then on, not as a whole. ValueError for a transformer without Meissonic's blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # what features returns is a view, and nothing changes it in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if not isinstance(transformer, MeissonicTransformer):
        raise ValueError("`parallel` fsdp shards Meissonic's transformer only: train this model with `parallel` ddp")
    kind = torch.device(device).type
    low = torch.bfloat16 if bf16 and kind != "cpu" else None
    mesh = init_device_mesh(kind, (world(),))
    offloading = CPUOffloadPolicy(pin_memory=kind != "cpu") if offload else OffloadPolicy()
    # what the blocks get is cast by the model itself: rotary angles stay in float32
    precision = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks, transformer.mlm_layer)
    for block in (*blocks, transformer):
        fully_shard(block, mesh=mesh, mp_policy=precision, offload_policy=offloading)
    register_fsdp_forward_method(transformer, "features")
    for module in transformer.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows sums only


@contextmanager
def gathered_weights(transformer: nn.Module, *, sharded: bool) -> Iterator[None]:
    """Within, the weights of a sharded transformer are whole on every rank, so that ranks may differ in how often they
    call it: rollouts have as many steps as their samples."""
    if not sharded:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(transformer, FSDPModule)  # as `shard` made it
    modules = [module for module in transformer.modules() if isinstance(module, FSDPModule)]
    transformer.set_reshard_after_forward(False)
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        transformer.set_reshard_after_forward(True)
        for module in modules:
            module.reshard()


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors, sharded or not, as whole ones in the processor's memory. Every rank calls it; all but 0 get none."""
    found = {}
    for name, value in tensors.items():
        value = value.detach()
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        if rank() == 0:
            found[name] = value.cpu()
    return found
