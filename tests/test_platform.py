"""What is read from the processor and the GPU."""

import pytest
import torch

from speedrl.system import platform


@pytest.mark.parametrize(("capability", "fast"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_is_used_only_on_gpus_that_have_it(capability, fast, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert platform.bf16_is_fast("cuda") is platform.bf16_is_fast("cuda:1") is fast


@pytest.mark.parametrize(
    ("amx", "avx512", "intel", "fast"),
    [
        (True, True, True, True),
        (False, True, True, False),  # half of fp32's rate
        (False, True, False, True),
        (False, False, False, False),  # emulated
    ],
)
def test_bf16_is_used_only_where_the_processor_gains_by_it(amx, avx512, intel, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(platform, "made_by_intel", lambda: intel)
    assert platform.bf16_is_fast("cpu") is fast
    assert platform.bf16_autocast("cpu")._enabled is fast
    assert platform.bf16_autocast("cpu", enabled=True)._enabled
