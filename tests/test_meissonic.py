"""The transformer: the released checkpoint's shape, and its parts against plain references."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from speedrl.models.generator import encode_prompts
from speedrl.models.meissonic import (
    Down,
    MeissonicTransformer,
    Up,
    attention,
    gelu_by_sigmoid,
    rope_table,
    rotate,
    sinusoid,
)
from speedrl.system.platform import fused_attention_is_slow


def test_the_released_configuration_has_the_released_tensors():
    with torch.device("meta"):
        model = MeissonicTransformer()
    state = model.state_dict()
    assert len(state) == 867
    assert sum(value.numel() for value in state.values()) == 1_006_946_304
    for key, shape in {
        "embed.embeddings.weight": (8256, 1024),
        "mlm_layer.conv2.weight": (8192, 1024, 1, 1),
        "cond_embed.linear_1.weight": (1024, 2304),
        "transformer_blocks.13.ff_context.net.0.proj.weight": (4096, 1024),
        "transformer_blocks.0.attn.to_out.0.bias": (1024,),
        "single_transformer_blocks.27.proj_out.weight": (1024, 5120),
        "down_block.downsample.conv.weight": (1024, 1024, 2, 2),
        "up_block.upsample.conv.weight": (1024, 1024, 2, 2),
    }.items():
        assert state[key].shape == shape, key


@pytest.mark.parametrize("kind", [Down, Up])
def test_the_2x_blocks_are_their_convolutions(kind):
    torch.manual_seed(0)
    block, x = kind(6), torch.randn(2, 4, 6, 6)
    block.norm.weight.data.normal_()
    expected = block.conv(block.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(block(x), expected)


def test_the_compiled_gelu_is_the_eager_one():
    x = torch.cat([torch.linspace(-12, 12, 1001), torch.tensor([-1e4, 1e4])]).requires_grad_()
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        found, wanted = gelu_by_sigmoid(x.to(dtype)), F.gelu(x.to(dtype), approximate="tanh")
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted, atol=close, rtol=close)
        slopes = [torch.autograd.grad(value.sum(), x)[0] for value in (found, wanted)]
        torch.testing.assert_close(*slopes, atol=close, rtol=close)


def test_rotary_embedding_is_a_complex_rotation():
    axes, height, width, text = (4, 6, 6), 3, 5, 2
    x = torch.randn(2, 3, text + height * width, sum(axes), generator=torch.Generator().manual_seed(0))
    table = rope_table(height, width, text, axes, torch.device("cpu"))
    places = [(0, 0, 0)] * text + [(0, row, column) for row in range(height) for column in range(width)]
    expected = torch.empty_like(x)
    for t, place in enumerate(places):
        angles = [p * 10000 ** (-2 * i / axis) for p, axis in zip(place, axes, strict=True) for i in range(axis // 2)]
        turn = torch.polar(torch.ones(len(angles)), torch.tensor(angles))
        expected[:, :, t] = torch.view_as_real(torch.view_as_complex(x[:, :, t].unflatten(-1, (-1, 2))) * turn).flatten(
            -2
        )
    torch.testing.assert_close(rotate(x, table), expected)


@pytest.mark.parametrize("length", [7, 600])
def test_explicit_attention_is_the_fused_one(length, monkeypatch):
    monkeypatch.setattr("speedrl.models.meissonic.fused_attention_is_slow", lambda *_: True)
    q, k, v = torch.randn(3, 2, 2, length, 8, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    found = attention(q, k, v)
    torch.testing.assert_close(found, expected)
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(*(torch.autograd.grad(x, (q, k, v), pull) for x in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_attention_is_explicit_on_a_cpu_where_it_is_short_or_in_bf16():
    bf16 = torch.bfloat16
    for length, dtype, slow in ((80, torch.float32, True), (1101, torch.float32, False), (1101, bf16, True)):
        assert fused_attention_is_slow("cpu", length, dtype) is slow
        assert not fused_attention_is_slow("cuda", length, dtype)
    assert not fused_attention_is_slow("cpu", 4173, bf16), "its weights would take too much memory"


def test_sinusoid_has_cosines_first():
    assert torch.equal(sinusoid(torch.zeros(1), 8), torch.tensor([[1.0, 1, 1, 1, 0, 0, 0, 0]]))


def test_the_rotary_axes_must_fill_the_head():
    with pytest.raises(ValueError, match="axes_dims_rope"):
        MeissonicTransformer(attention_head_dim=64)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_generator):
    prompts = encode_prompts(tiny_generator, ["a", "b"])
    tokens, timestep = torch.full((2, 4, 4), tiny_generator.mask_id), torch.tensor([3, 1])
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(tiny_generator.transformer).train()
        model.gradient_checkpointing = checkpointing
        model(tokens, timestep, *prompts).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 40
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_head_at_chosen_places_is_the_forward_there(tiny_generator):
    model, prompts = tiny_generator.transformer, encode_prompts(tiny_generator, ["a", "b"])
    tokens, timestep = torch.full((2, 4, 4), tiny_generator.mask_id), torch.tensor([3, 1])
    with torch.no_grad():
        features = model.features(tokens, timestep, *prompts)
        torch.testing.assert_close(model.head(features[:, [3, 7]]), model(tokens, timestep, *prompts)[:, [3, 7]])


def test_without_a_compiler_the_blocks_stay_as_they_are(tiny_generator, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    model = copy.deepcopy(tiny_generator.transformer)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        model.compile_blocks()
    tokens, prompts = torch.full((1, 4, 4), tiny_generator.mask_id), encode_prompts(tiny_generator, ["a"])
    found, expected = (m(tokens, torch.tensor([3]), *prompts) for m in (model, tiny_generator.transformer))
    assert torch.equal(found, expected)


def test_text_timestep_and_tokens_all_matter(tiny_generator):
    network, prompts = tiny_generator.transformer, encode_prompts(tiny_generator, ["a", "b"])
    tokens = torch.full((2, 4, 4), tiny_generator.mask_id)
    with torch.no_grad():
        one, other = network(tokens, torch.tensor([3, 3]), *prompts)
        later, _ = network(tokens, torch.tensor([1, 3]), *prompts)
        tokens[0, 1, 1] = 2
        known, _ = network(tokens, torch.tensor([3, 3]), *prompts)
    assert one.shape == (16, tiny_generator.codes)
    assert all((one - x).abs().max() > 1e-4 for x in (other, later, known))


REFERENCE = Path(__file__).parent / "data" / "meissonic_logits.safetensors"  # made as data/README.md says


def reference_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Hashed places, in place of random numbers that another version of torch might draw differently."""
    state = {}
    for key, value in model.state_dict().items():
        wave = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * 12.9898 + sum(map(ord, key))) * 43758.5453
        wave = ((wave - wave.floor()) * 2 - 1).float().view(value.shape)
        if "norm" in key and value.ndim == 1 and key.endswith("weight") and "linear" not in key:
            state[key] = 1 + 0.2 * wave
        else:
            state[key] = wave * (2.0 * value[0].numel() ** -0.5 if value.ndim > 1 else 0.1)
    return state


@pytest.mark.parametrize("configuration", [0, 1, 2])
def test_logits_are_the_originals(configuration):
    with safe_open(REFERENCE, "pt") as file:
        config = json.loads(file.metadata()["configs"])[configuration]
        values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model = MeissonicTransformer(**config).eval()
    model.load_state_dict(reference_weights(model))
    for shape in range(3):
        names = ("tokens", "timestep", "text", "pooled", "micro_conds", "logits")
        tokens, *others, logits = (values[f"{configuration}.{shape}.{name}"] for name in names)
        with torch.no_grad():
            found = model(tokens.long(), *others).view(len(tokens), *tokens.shape[1:], -1).permute(0, 3, 1, 2)
            moved = model(tokens.long(), *others[:3], others[3] + 100)
        assert (found - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert (moved.flatten() - found.permute(0, 2, 3, 1).flatten()).abs().max() > 1e-2, "a test that sees nothing"
