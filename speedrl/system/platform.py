"""What the machine needs before the heavy packages are imported, in one place."""

import ctypes
import importlib.util
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from speedrl.system.errors import one_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def quiet_allocator() -> None:
    """Keeps freed memory in the process: on CPU, giving large buffers back to the kernel and faulting them in again
    cost half of a forward pass (glibc only; elsewhere nothing happens)."""
    tune_allocator({-1: 2**31 - 1, -2: 2**28, -4: 0})  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX


def frugal_allocator() -> None:
    """Gives buffers over 32 MB back at once, whatever `quiet_allocator` said: for pictures so large that a single
    activation takes a gigabyte. What is kept of those, in pieces, costs more than faulting them in beside the work."""
    tune_allocator({-4: 2**16, -3: 2**25})  # M_MMAP_MAX, M_MMAP_THRESHOLD


def tune_allocator(options: Mapping[int, int]) -> None:
    """glibc's mallopt, where there is one."""
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for option, value in options.items():
        mallopt(option, value)


def import_torchvision() -> None:
    """Imports torchvision, also where its wheel was built for CUDA and the torch beside it was not.

    Such a wheel fails on `operator torchvision::nms does not exist` because its compiled operators cannot load, and
    with it open_clip, timm and diffusers. Nothing here uses those operators: declaring their schemas is enough.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision._speedrl_library = library  # the declarations live as long as the module


def bf16_autocast(device: torch.device | str, *, enabled: bool | None = None) -> torch.autocast:
    """bf16 autocast, by default where `bf16_is_fast`."""
    enabled = bf16_is_fast(device) if enabled is None else enabled
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def bf16_is_fast(device: torch.device | str) -> bool:
    """Whether bf16 products are faster than fp32 ones: on GPUs of compute capability 8.0 and later, on processors with
    AMX, and on AMD's with AVX-512 bf16. Older GPUs (V100, T4) emulate it.

    Intel's AVX-512 bf16 alone (a virtual machine may hide AMX) reached half of fp32's rate when measured; where a
    processor has none of them, oneDNN emulates bf16, many times slower than fp32. By what the processor says and not by
    a measurement, so that every rank and a resumed run decide alike.
    """
    kind = torch.device(device).type
    if kind == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if kind != "cpu":
        return True
    amx, avx512 = (
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return bool(amx or (avx512 and not made_by_intel()))


def fused_attention_is_slow(device: torch.device | str, length: int, dtype: torch.dtype) -> bool:
    """Whether softmax(q k^T) v in three operations beats PyTorch's fused kernel over `length` places.

    On a CPU: up to 512, above all backward, and in bf16 up to 2048, two to three times as fast; past that its memory is
    too much.
    """
    return torch.device(device).type == "cpu" and length <= (2048 if dtype == torch.bfloat16 else 512)


def made_by_intel() -> bool:
    """Whether the processor says that it is Intel's."""
    try:
        said = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        said = platform.processor()
    return "GenuineIntel" in said


def check_device(device: torch.device | str) -> None:
    """ValueError for a device that is not there."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device` {device} cannot be used: {one_line(error)}") from error


def pick_device(device: str) -> str:
    """The device of a name; "auto" is the first of cuda, mps and cpu that works. Several stay as they are."""
    if device != "auto":
        return device
    for name, there in (("cuda", torch.cuda.is_available), ("mps", torch.backends.mps.is_available)):
        if there():
            try:
                torch.ones(2, device=name).sum().item()
                return name
            except RuntimeError:
                continue
    return "cpu"


def can_compile(device: torch.device | str) -> bool:
    """Whether torch.compile can make code for a device, with a warning where it cannot: on CPU it needs a C++ compiler,
    which it looks for by this name."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if torch.device(device).type != "cpu" or shutil.which(compiler):
        return True
    warnings.warn(f"nothing is compiled, as there is no C++ compiler {compiler}: it will be slower", stacklevel=3)
    return False


def compile_seconds() -> float:
    """How long this process has spent in torch.compile."""
    found = torch._dynamo.utils.calculate_time_spent() if "torch._dynamo" in sys.modules else {}
    return sum(found.get(name, 0.0) for name in ("entire_frame_compile", "entire_backward_compile"))
