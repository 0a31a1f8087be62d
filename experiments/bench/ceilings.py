"""What the machine can do at best: a large matrix product, and a copy of memory."""

import torch

from experiments.bench.measure import seconds_of


def ceilings(*, device: str, small: bool) -> dict[str, float]:
    """TFLOP/s of a large product in fp32 and bf16, and GB/s, read and written, of a copy."""
    gpu = torch.device(device).type == "cuda"
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        side = 256
        seconds = product(side, dtype, device=device)
        # processors without bf16 products emulate them, too slowly for a large one
        while not small and side < (8192 if gpu else 2048) and 8 * seconds < 1:
            side *= 2
            seconds = product(side, dtype, device=device)
        found[f"{name} TFLOP/s"] = 2 * side**3 / seconds / 1e12
    source = torch.zeros(2**22 if small else 2**30 if gpu else 2**27, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device=device, warmup=2)
    found["copy GB/s"] = 2 * source.numel() / seconds / 1e9
    return found


def product(side: int, dtype: torch.dtype, *, device: str) -> float:
    """Seconds of a product of two square matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return seconds_of(lambda: a @ b, device=device, warmup=2)
