"""What the machine needs before the heavy packages are imported, in one place."""

import ctypes
import importlib.util
import os
import shutil
import sys
import warnings

import torch


def quiet_allocator() -> None:
    """Keeps freed memory in the process: on CPU, giving large buffers back to the kernel and faulting them in again
    cost half of a forward pass (glibc only; elsewhere nothing happens)."""
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-2, 2**28)  # M_TOP_PAD
    mallopt(-4, 0)  # M_MMAP_MAX


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
    """Whether bf16 products are faster than fp32 ones: on GPUs, and on processors that have them in hardware.

    Elsewhere oneDNN emulates bf16, many times slower than fp32.
    """
    if torch.device(device).type != "cpu":
        return True
    capability = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(capability())


def can_compile(device: torch.device | str) -> bool:
    """Whether torch.compile can make code for a device, with a warning where it cannot: on CPU it needs a C++ compiler,
    which it looks for by this name."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if torch.device(device).type != "cpu" or shutil.which(compiler):
        return True
    warnings.warn(f"nothing is compiled, as there is no C++ compiler {compiler}: it will be slower", stacklevel=3)
    return False
