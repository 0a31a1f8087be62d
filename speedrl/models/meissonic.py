"""The Meissonic transformer, written for this project, with the released checkpoint's names and shapes.

Double-stream blocks (text and picture with weights of their own), then single-stream blocks over both, between a 2x
down and a 2x up block (Meissonic, arXiv 2410.08261). The released 1B model has 867 tensors and 1,006,946,304
parameters; the embedded one is the same class at a small configuration.
"""

import inspect
import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speedrl.models.generator import Transformer
from speedrl.system.platform import can_compile, fused_attention_is_slow

# what the released scripts lead away from
NEGATIVE = (
    "worst quality, low quality, low res, blurry, distortion, watermark, logo, signature, text, jpeg artifacts, "
    "signature, sketch, duplicate, ugly, identifying mark"
)
MICRO = 256  # width of each micro-condition's and of the timestep's sinusoidal embedding


def sinusoid(values: Tensor, width: int = MICRO) -> Tensor:
    """Sinusoidal embedding, cosines first: float [N] -> float32 [N, width]."""
    half = width // 2
    exponents = -math.log(10000) / half * torch.arange(half, device=values.device, dtype=torch.float32)
    # through float64: the last bit of a float32 exp depends on the processor, and a timestep of 63,000 makes it seen
    angles = values.float()[:, None] * exponents.double().exp().float()
    return torch.cat([angles.cos(), angles.sin()], -1)


def rope_table(height: int, width: int, text: int, axes: tuple[int, ...], device: torch.device) -> Tensor:
    """Rotary angles as (cos, sin): float32 [2, text + height * width, sum(axes) / 2], text at the origin.

    Picture tokens stand at (0, row, column) of the grid inside the 2x down block. Angles are taken in float64.
    """
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1)
    places = torch.cat([torch.zeros(text, 3, dtype=places.dtype, device=device), places]).double()
    turns = []
    for axis, size in enumerate(axes):
        rates = 10000.0 ** -(torch.arange(0, size, 2, device=device, dtype=torch.float64) / size)
        turns.append(places[:, axis, None] * rates)
    angles = torch.cat(turns, -1)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotates interleaved pairs of the last dimension in float32: x [B, heads, T, D], rope [2, T, D / 2]."""
    even, odd = rearrange(x.float(), "... (d two) -> two ... d", two=2)
    cos, sin = rope
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return turned.flatten(-2).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over [B, heads, T, D] -> [B, T, heads * D]."""

    def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v

    if not fused_attention_is_slow(q.device, q.shape[-2], q.dtype):
        mixed = F.scaled_dot_product_attention(q, k, v)
    elif q.shape[-2] <= 512:
        mixed = explicit(q, k, v)
    else:  # a head at a time, so that its weights stay in the processor's cache
        mixed = torch.cat([explicit(*head) for head in zip(*(x.split(1, 1) for x in (q, k, v)), strict=True)], 1)
    return rearrange(mixed, "b h t d -> b t (h d)")


def gelu(x: Tensor) -> Tensor:
    """The GELU that is approximated by a tanh. Compiled, as the sigmoid that it equals: exp is vectorised far better
    than tanh, and of a small network's time outside its products the tanh was half."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return gelu_by_sigmoid(x)


def gelu_by_sigmoid(x: Tensor) -> Tensor:
    """x (1 + tanh(z)) / 2 = x sigmoid(2 z) with z = sqrt(2 / pi) (x + 0.044715 x^3), in float32."""
    wide = x.float()
    return (wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)


def fp16_range(x: Tensor) -> Tensor:
    """Keeps float16 activations finite, as the original does."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        scale = x.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        return (x * scale).to(x.dtype) * self.weight


class MLPEmbedding(nn.Module):
    """linear_1, SiLU, linear_2."""

    def __init__(self, width_in: int, width: int, *, bias: bool = True):
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width, bias=bias)
        self.linear_2 = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeTextEmbed(nn.Module):
    def __init__(self, width: int, pooled: int):
        super().__init__()
        self.timestep_embedder = MLPEmbedding(MICRO, width)
        self.text_embedder = MLPEmbedding(pooled, width)


class Modulation(nn.Module):
    """The adaptive LayerNorm's linear layer: `parts` vectors of shift, scale and gate from the conditioning."""

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.linear(condition)[:, None].chunk(self.parts, -1)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Attention(nn.Module):
    """Projections of one block; those for the text exist in double-stream blocks only."""

    def __init__(self, width: int, head: int, *, added: bool):
        super().__init__()
        self.heads = width // head
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = RMSNorm(head), RMSNorm(head)
        if added:
            self.add_q_proj, self.add_k_proj = nn.Linear(width, width), nn.Linear(width, width)
            self.add_v_proj, self.to_add_out = nn.Linear(width, width), nn.Linear(width, width)
            self.norm_added_q, self.norm_added_k = RMSNorm(head), RMSNorm(head)
            self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b t (h d) -> b h t d", h=self.heads)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.split(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v

    def added_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.split(layer(x)) for layer in (self.add_q_proj, self.add_k_proj, self.add_v_proj))
        return self.norm_added_q(q), self.norm_added_k(k), v


class Projected(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return gelu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        # index 1 is the original's dropout, which has no weights
        self.net = nn.Sequential(Projected(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class DoubleBlock(nn.Module):
    def __init__(self, width: int, head: int):
        super().__init__()
        self.norm1, self.norm1_context = Modulation(width, 6), Modulation(width, 6)
        self.attn = Attention(width, head, added=True)
        self.ff, self.ff_context = FeedForward(width), FeedForward(width)

    def forward(self, x: Tensor, text: Tensor, condition: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1(condition)
        t_shift, t_scale, t_gate, t_shift_ff, t_scale_ff, t_gate_ff = self.norm1_context(condition)
        of_text = self.attn.added_qkv(modulated(text, t_shift, t_scale))
        of_picture = self.attn.qkv(modulated(x, shift, scale))
        q, k, v = (torch.cat(pair, 2) for pair in zip(of_text, of_picture, strict=True))
        mixed = attention(rotate(q, rope), rotate(k, rope), v)
        t_mixed, mixed = mixed.split([text.shape[1], x.shape[1]], 1)
        x = x + gate * self.attn.to_out[0](mixed)
        x = x + gate_ff * self.ff(modulated(x, shift_ff, scale_ff))
        text = text + t_gate * self.attn.to_add_out(t_mixed)
        text = text + t_gate_ff * self.ff_context(modulated(text, t_shift_ff, t_scale_ff))
        return x, fp16_range(text)


class SingleBlock(nn.Module):
    def __init__(self, width: int, head: int):
        super().__init__()
        self.norm = Modulation(width, 3)
        self.attn = Attention(width, head, added=False)
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(5 * width, width)

    def forward(self, x: Tensor, condition: Tensor, rope: Tensor) -> Tensor:
        shift, scale, gate = self.norm(condition)
        normed = modulated(x, shift, scale)
        q, k, v = self.attn.qkv(normed)
        mixed = attention(rotate(q, rope), rotate(k, rope), v)
        inner = gelu(self.proj_mlp(normed))
        return fp16_range(x + gate * self.proj_out(torch.cat([mixed, inner], -1)))


class TokenEmbed(nn.Module):
    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, width)
        self.layer_norm = RMSNorm(width)
        self.conv = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of `embeddings` of the tokens, which are looked up apart: see `MeissonicTransformer.features`."""
        return F.linear(self.layer_norm(x), self.conv.weight.flatten(1))


class Head(nn.Module):
    def __init__(self, width: int, codes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 1, bias=False)
        self.layer_norm = RMSNorm(width)
        self.conv2 = nn.Conv2d(width, codes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer_norm(F.linear(x, self.conv1.weight.flatten(1))), self.conv2.weight.flatten(1))


class Down(nn.Module):
    """RMSNorm and a 2x2 convolution of stride 2, as one product."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = RMSNorm(width)
        self.conv = nn.Conv2d(width, width, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H/2, W/2, C]"""
        # channels last, here and in `Up`: whole vectors are moved, and only the small weight is turned
        blocks = rearrange(self.norm(x), "b (h p) (w q) c -> b h w (p q c)", p=2, q=2)
        return F.linear(blocks, rearrange(self.conv.weight, "o c p q -> o (p q c)"))


class Up(nn.Module):
    """RMSNorm and a 2x2 transposed convolution of stride 2, as one product."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = RMSNorm(width)
        self.conv = nn.ConvTranspose2d(width, width, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, 2H, 2W, C]"""
        blocks = F.linear(self.norm(x), rearrange(self.conv.weight, "c o p q -> (p q o) c"))
        return rearrange(blocks, "b h w (p q o) -> b (h p) (w q) o", p=2, q=2)


class MeissonicTransformer(Transformer):
    """Logits over codes for every token of a masked grid. Keyword arguments are those of its config.json.

    ValueError where the head's width does not match the rotary axes, or the pooled text the transformer.
    """

    def __init__(
        self,
        *,
        num_layers: int = 14,
        num_single_layers: int = 28,
        attention_head_dim: int = 128,
        num_attention_heads: int = 8,
        joint_attention_dim: int = 1024,
        pooled_projection_dim: int = 1024,
        axes_dims_rope: tuple[int, ...] = (16, 56, 56),
        vocab_size: int = 8256,
        codebook_size: int = 8192,
        downsample: bool = True,
        upsample: bool = True,
    ):
        super().__init__()
        width, head = num_attention_heads * attention_head_dim, attention_head_dim
        if sum(axes_dims_rope) != head:
            raise ValueError(f"axes_dims_rope {tuple(axes_dims_rope)} must add up to attention_head_dim {head}")
        if pooled_projection_dim != width:
            raise ValueError(f"pooled_projection_dim {pooled_projection_dim} must be the transformer's width, {width}")
        self.axes = tuple(axes_dims_rope)
        self.codes, self.vocabulary = codebook_size, vocab_size
        self.compiled = False
        self.ropes: dict[tuple, Tensor] = {}
        self.time_text_embed = TimeTextEmbed(width, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.cond_embed = MLPEmbedding(5 * MICRO + pooled_projection_dim, width, bias=False)
        self.encoder_proj_layer_norm = RMSNorm(width)
        self.embed = TokenEmbed(vocab_size, width)
        self.down_block = nn.ModuleDict({"downsample": Down(width)} if downsample else {})
        self.project_to_hidden_norm = RMSNorm(width)
        self.project_to_hidden = nn.Linear(width, width, bias=False)
        self.transformer_blocks = nn.ModuleList([DoubleBlock(width, head) for _ in range(num_layers)])
        self.single_transformer_blocks = nn.ModuleList([SingleBlock(width, head) for _ in range(num_single_layers)])
        self.project_from_hidden_norm = RMSNorm(width)
        self.project_from_hidden = nn.Linear(width, width, bias=False)
        self.up_block = nn.ModuleDict({"upsample": Up(width)} if upsample else {})
        self.mlm_layer = Head(width, codebook_size)

    @classmethod
    def of_config(cls, config: dict) -> Self:
        """What a config.json leaves out is as in the original code; its keys for other classes are passed over."""
        known = inspect.signature(cls).parameters
        return cls(**{"downsample": False, "upsample": False} | {k: v for k, v in config.items() if k in known})

    @classmethod
    def defaults(cls, config: dict) -> dict[str, Any]:
        """As the released scripts sample: Meissonic at 1024 pixels, and Monetico, without sampling down, at 512."""
        side, steps = (64, 64) if config.get("downsample") else (32, 48)
        return {"sample_size": side, "num_inference_steps": steps, "guidance_scale": 9.0, "negative_prompt": NEGATIVE}

    def rope(self, height: int, width: int, text: int, device: torch.device) -> Tensor:
        """`rope_table` of this model, computed once for each grid."""
        key = (height, width, text, str(device))
        if key not in self.ropes:
            with torch.inference_mode(False):  # whoever asks first: training reads it too
                self.ropes[key] = rope_table(height, width, text, self.axes, device)
        return self.ropes[key]

    def compile_blocks(self, *, backend: str = "inductor") -> None:
        """Compiles each kind of block once for all its layers, and what goes before and after them, for any batch size:
        seconds, where the whole network would take minutes. Nothing where `can_compile` says that it cannot."""
        if backend == "inductor" and not can_compile(self.project_to_hidden.weight.device):
            return
        if self.compiled:
            return
        self.compiled = True
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            block.compile(backend=backend)
        for name in ("into_blocks", "out_of_blocks"):
            setattr(self, name, torch.compile(getattr(self, name), backend=backend))

    def into_blocks(self, x: Tensor) -> Tensor:
        """Embeddings [B, H, W, width] -> what the blocks work on [B, H / 2, W / 2, width], or [B, H, W, width]."""
        x = self.embed(x)
        for block in self.down_block.values():
            x = block(x)
        return self.project_to_hidden(self.project_to_hidden_norm(x))

    def out_of_blocks(self, x: Tensor) -> Tensor:
        """The way back, to what the head reads: [B, H, W, width]."""
        x = self.project_from_hidden(self.project_from_hidden_norm(x))
        for block in self.up_block.values():
            x = block(x)
        return x

    def features(self, tokens: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor, micro_conds: Tensor) -> Tensor:
        """What the head reads: tokens int64 [B, H, W] (even H and W), timestep [B], text [B, T, joint_attention_dim],
        pooled [B, pooled_projection_dim], micro_conds [B, 5] -> [B, H * W, width]."""
        dtype = self.project_to_hidden.weight.dtype
        micro = rearrange(sinusoid(micro_conds.flatten()), "(b n) d -> b (n d)", n=micro_conds.shape[-1])
        pooled = self.cond_embed(torch.cat([pooled.to(dtype), micro.to(dtype)], -1))
        # the original rounds the timestep to its own precision first
        time = self.time_text_embed.timestep_embedder(sinusoid(timestep.to(dtype) * 1000).to(dtype))
        condition = F.silu(time + self.time_text_embed.text_embedder(pooled))
        text = self.encoder_proj_layer_norm(self.context_embedder(text.to(dtype)))

        def any_batch(*values: Tensor) -> None:
            """The batch, and nothing else, may differ from call to call, also where it is another size's equal now."""
            for value in values if self.compiled else ():
                torch._dynamo.maybe_mark_dynamic(value, 0)

        # not compiled: the order of the sums in its gradient would be left to chance
        x = self.embed.embeddings(tokens)
        any_batch(x)
        x = self.into_blocks(x)
        height, width = x.shape[1:3]
        x, rope = x.flatten(1, 2), self.rope(height, width, text.shape[1], x.device)

        def run(block: nn.Module, *inputs: Tensor):
            any_batch(*inputs[:-1])
            if self.gradient_checkpointing and torch.is_grad_enabled():
                return checkpoint(block, *inputs, use_reentrant=False)
            return block(*inputs)

        for block in self.transformer_blocks:
            x, text = run(block, x, text, condition, rope)
        x = torch.cat([text, x], 1)
        for block in self.single_transformer_blocks:
            x = run(block, x, condition, rope)
        x = rearrange(x[:, text.shape[1] :], "b (h w) c -> b h w c", h=height)
        any_batch(x)
        return self.out_of_blocks(x).flatten(1, 2)

    def head(self, features: Tensor) -> Tensor:
        """features [..., width] -> logits [..., codes]. Pointwise: gather the positions that are needed first."""
        return self.mlm_layer(features)
