"""What a training takes on each GPU and between them, computed from numbers of parameters: to plan past one machine."""

import math

import torch

from experiments.bench.flops import forward_flops
from speedrl.method.schedules import masked_counts
from speedrl.models.meissonic import MeissonicTransformer

DECODE = 7.64e12  # operations of the VQ decoder for 1024x1024 pixels
MEISSONIC = {"transformer": 1_006_946_304, "text_encoder": 354_000_000, "vq": 146_000_000, "lora_16": 21_000_000}


def memory(
    transformer: int,
    *,
    trained: int | None = None,
    frozen: int = 0,
    reference: bool = True,
    ema: bool = False,
    ranks: int = 1,
    parallel: str = "ddp",
    offload: bool = False,
    gathered_bytes: int = 2,
) -> dict[str, float]:
    """Bytes on each GPU by what they are for, all but activations and the pictures' decoder at work.

    transformer, its parameters; trained, those that train, by default all, or an adapter's beside them, for which the
    base is the reference; frozen, those of the text encoder and the VQ, which every rank has. Everything is float32:
    weights, gradients, AdamW's two moments, the reference and the moving average. "fsdp" divides all that by `ranks`,
    and has the whole transformer while pictures are sampled, in `gathered_bytes` a number (bf16 on a GPU); with
    `offload` that, and nothing else of the transformer, is on the GPU.
    """
    adapter = 0 if trained is None else trained
    trained = transformer if trained is None else trained
    share = (0 if offload else 1 / ranks) if parallel == "fsdp" else 1
    return {
        "weights": 4 * (transformer + adapter) * share,
        "gradients": 4 * trained * share,
        "optimizer": 8 * trained * share,
        "reference": 4 * transformer * share * (reference and not adapter),
        "average": 4 * trained * share * ema,
        "gathered": gathered_bytes * (transformer + adapter) * (parallel == "fsdp"),
        "frozen": 4 * frozen,
    }


def communication(
    transformer: int,
    *,
    trained: int | None = None,
    reference: bool = True,
    ranks: int,
    parallel: str = "ddp",
    updates: int = 1,
    micro_batches: int = 1,
    gathered_bytes: int = 2,
) -> float:
    """Bytes that each rank sends in an iteration, by the ring algorithms' (ranks - 1) / ranks of what is shared.

    "ddp" sums the gradient once an update, whatever the number of micro-batches. "fsdp" gathers the transformer once to
    sample, and for every micro-batch on the way forward, on the way back and for the reference, and scatters its
    gradient. Rewards and statistics, a few kilobytes, do not count.
    """
    around = (ranks - 1) / ranks
    adapter = 0 if trained is None else trained
    trained = transformer if trained is None else trained
    if parallel == "ddp":
        return 2 * around * 4 * trained * updates
    whole = gathered_bytes * (transformer + adapter)
    each = (3 if reference else 2) * whole + 4 * trained
    return around * (whole + updates * micro_batches * each)


def picture_flops(
    transformer: MeissonicTransformer,
    *,
    grid: tuple[int, int],
    text: int,
    steps: int,
    trained: int | None = None,
    guidance: float = 1.0,
    reference: bool = True,
) -> tuple[float, float]:
    """Operations that a picture of an iteration takes of the transformer, to sample it and in one update on it.

    What the mathematics needs: the head where something is masked, in training where something is revealed, and nothing
    that is computed again; the reference policy at the policy's guidance. `trained` steps of `steps`, by default all.
    """
    calls, length = 1 if guidance == 1 else 2, grid[0] * grid[1]
    trained = steps if trained is None else trained

    def forward(places: int) -> int:
        return forward_flops(transformer, batch=calls, grid=grid, text=text, places=places)

    masked = [length, *masked_counts(torch.tensor([steps]), length=length)[0].tolist()][:steps]
    training = trained * forward(0) + (forward(length) - forward(0)) * trained / steps
    return float(sum(map(forward, masked))), training * (4 if reference else 3)


def throughput(
    flops: float, *, rate: float, pictures: int = 1, sent: float = 0.0, bandwidth: float = math.inf
) -> float:
    """Pictures a second of one GPU of `rate` operations a second, of `flops` operations each, in iterations of so many
    `pictures` on it, for which it sends `sent` bytes at `bandwidth` bytes a second while nothing else goes on."""
    return pictures / (pictures * flops / rate + sent / bandwidth)


def plan(*, steps: int = 16, trained: int = 4, rates: tuple[float, ...] = (1e14, 2e14, 4e14), ranks: int = 8) -> str:
    """Pictures a second of the released Meissonic at 1024x1024 with guidance, as Markdown, at `rates` of a GPU."""
    with torch.device("meta"):
        network = MeissonicTransformer()
    parts = (*picture_flops(network, grid=(64, 64), text=77, steps=steps, trained=trained, guidance=9.0), DECODE)
    lines = [
        "| TFLOP/s that a GPU reaches | seconds of an image: sampling + decoder + training "
        f"| images/s of {ranks} GPUs |",
        "|--:|--:|--:|",
    ]
    for rate in rates:
        sampling, training, decoder = (part / rate for part in parts)
        each = throughput(sum(parts), rate=rate)
        shown = f"{sampling:.2f} + {decoder:.2f} + {training:.2f}"
        lines.append(f"| {rate / 1e12:.0f} | {shown} | {ranks * each:.1f} |")
    return "\n".join(lines) + "\n"


def table(*, ranks: int = 8, micro_batches: int = 4) -> str:
    """Memory and communication of the released Meissonic as Markdown, in GB of 10^9 bytes."""
    size, frozen = MEISSONIC["transformer"], MEISSONIC["text_encoder"] + MEISSONIC["vq"]
    rows = [
        ("one GPU or `ddp`", {}),
        ("one GPU or `ddp`, `--lora 16`", {"trained": MEISSONIC["lora_16"]}),
        (f"`fsdp` on {ranks}", {"parallel": "fsdp", "ranks": ranks}),
        (f"`fsdp` on {ranks}, `--lora 16`", {"parallel": "fsdp", "ranks": ranks, "trained": MEISSONIC["lora_16"]}),
        (f"`fsdp` on {ranks}, `--offload`", {"parallel": "fsdp", "ranks": ranks, "offload": True}),
    ]
    lines = [f"| | memory of each GPU | sent by each of {ranks} an iteration |", "|---|--:|--:|"]
    for name, how in rows:
        held = sum(memory(size, frozen=frozen, **how).values())
        shared = {key: value for key, value in how.items() if key in ("trained", "parallel")}
        sent = communication(size, ranks=ranks, micro_batches=micro_batches, **shared)
        lines.append(f"| {name} | {held / 1e9:.1f} GB | {sent / 1e9:.1f} GB |")
    return "\n".join(lines) + "\n"
