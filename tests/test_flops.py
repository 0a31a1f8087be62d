"""The formula for operations against PyTorch's counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments.bench.flops import forward_flops
from speedrl.models.meissonic import MeissonicTransformer

SMALL = dict(
    attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=32,
    axes_dims_rope=(4, 6, 6), vocab_size=40, codebook_size=48,
)


def inputs(batch: int, grid: tuple[int, int], text: int) -> tuple[torch.Tensor, ...]:
    return (torch.zeros(batch, *grid, dtype=torch.int64), torch.ones(batch, dtype=torch.int64),
            torch.randn(batch, text, 24), torch.randn(batch, 32), torch.ones(batch, 5))


@pytest.mark.parametrize(
    ("layers", "scale", "batch", "grid", "text", "places"),
    [((1, 2), True, 3, (4, 6), 5, None), ((2, 0), True, 2, (8, 8), 7, 11), ((0, 1), False, 1, (4, 4), 3, 2)],
)
def test_the_formula_is_the_counter(layers, scale, batch, grid, text, places):
    sizes = {"num_layers": layers[0], "num_single_layers": layers[1], "downsample": scale, "upsample": scale}
    model = MeissonicTransformer(**SMALL | sizes)
    with FlopCounterMode(display=False) as forward:
        features = model.features(*inputs(batch, grid, text))
        logits = model.head(features[:, :places])
    expected = forward_flops(model, batch=batch, grid=grid, text=text, places=places)
    assert forward.get_total_flops() == expected > 1e5
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert backward.get_total_flops() == pytest.approx(2 * expected, rel=0.08)  # the first layers' inputs need none


def test_long_sequences_take_the_fused_attention_and_count_the_same():
    model = MeissonicTransformer(**SMALL, num_layers=1, num_single_layers=1)
    # the counter does not know the CPU's fused kernel: the same attention in plain products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted, torch.no_grad():
        model(*inputs(1, (48, 48), 4))
    assert counted.get_total_flops() == forward_flops(model, batch=1, grid=(48, 48), text=4)


def test_the_released_size_takes_the_operations_known_of_it():
    """1.48 TFLOP for a picture of 1024 pixels, 0.077 of it the head's."""
    with torch.device("meta"):
        model = MeissonicTransformer()
    whole = forward_flops(model, batch=1, grid=(64, 64), text=77)
    without = forward_flops(model, batch=1, grid=(64, 64), text=77, places=0)
    assert whole / 1e12 == pytest.approx(1.48, rel=0.02) and (whole - without) / 1e12 == pytest.approx(0.077, rel=0.02)
