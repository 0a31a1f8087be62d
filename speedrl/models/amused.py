"""aMUSEd's transformer (arXiv 2401.01808) as the rollouts and the loss want it: features first, the head where needed.

It is diffusers' own UVit2DModel, with its weights and names; only what surrounds them is ours.
"""

import itertools
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.unets.uvit_2d import UVit2DModel
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from speedrl.models.generator import Transformer
from speedrl.system.platform import can_compile, fused_attention_is_slow


class Processor:
    """diffusers' own attention, its explicit one where the fused kernel is slow."""

    def __init__(self):
        self.explicit, self.fused = AttnProcessor(), AttnProcessor2_0()

    def __call__(self, attn: Attention, hidden_states: Tensor, *inputs: Tensor, **options) -> Tensor:
        slow = fused_attention_is_slow(hidden_states.device, hidden_states.shape[1], hidden_states.dtype)
        return (self.explicit if slow else self.fused)(attn, hidden_states, *inputs, **options)


class Block(BasicTransformerBlock):
    """A block that can be computed again in the backward pass: diffusers' own way of doing so fails on keywords."""

    checkpointed = False

    def forward(self, *inputs, **options):
        run = super().forward
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(partial(run, **options), *inputs, use_reentrant=False)
        return run(*inputs, **options)


def as_it_is(features: Tensor) -> Tensor:
    return features


class AmusedTransformer(Transformer, UVit2DModel):  # type: ignore[misc]  # diffusers' own bases disagree
    """Keyword arguments are those of its config.json. It takes the same inputs as `MeissonicTransformer`; the timestep
    plays no part."""

    def __init__(self, **config):
        super().__init__(**config)
        self.codes, self.vocabulary = self.config.codebook_size, self.config.vocab_size
        for layer in self.transformer_layers:
            layer.__class__ = Block
        for module in self.modules():
            if isinstance(module, Attention):
                module.set_processor(Processor())
        self.mlm_layer.forward = as_it_is  # UVit2DModel.forward then ends in what the head reads

    @property
    def gradient_checkpointing(self) -> bool:
        return False  # what UVit2DModel.forward looks at; see Block

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        for layer in getattr(self, "transformer_layers", ()):
            layer.checkpointed = on

    @classmethod
    def defaults(cls, config: dict) -> dict[str, Any]:
        """As diffusers' pipeline samples."""
        return {"num_inference_steps": 12, "guidance_scale": 10.0}

    def compile_blocks(self, *, backend: str = "inductor") -> None:
        """Compiles each kind of block once for all layers, for any batch size. Nothing where `can_compile` says that it
        cannot."""
        if backend == "inductor" and not can_compile(self.device):
            return
        lists = [getattr(part, kind) for part in (self.down_block, self.up_block)
                 for kind in ("res_blocks", "attention_blocks")]
        for layer in itertools.chain(self.transformer_layers, *lists):
            layer.compile(dynamic=True, backend=backend)

    def features(self, tokens: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor, micro_conds: Tensor) -> Tensor:
        """tokens int64 [B, H, W], text [B, T, D], pooled [B, P], micro_conds [B, 5] -> [B, H * W, channels]."""
        found = UVit2DModel.forward(self, tokens, text.to(self.dtype), pooled.to(self.dtype), micro_conds.float())
        return rearrange(found, "b c h w -> b (h w) c")

    def head(self, features: Tensor) -> Tensor:
        """features [..., channels] -> logits [..., codes]. Pointwise: gather the positions that are needed first."""
        first, last = self.mlm_layer.conv1, self.mlm_layer.conv2
        hidden = self.mlm_layer.layer_norm(F.linear(features, first.weight.flatten(1), first.bias))
        return F.linear(hidden, last.weight.flatten(1), last.bias)
