"""A tiny random generator in Meissonic's layout: 4x4 tokens, 16x16 pixels."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from speedrl.models.loading import load_generator
from speedrl.models.meissonic import MeissonicTransformer
from speedrl.system.platform import import_torchvision

TRANSFORMER = dict(
    num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
    pooled_projection_dim=32, axes_dims_rope=[4, 6, 6], vocab_size=40, codebook_size=32,
    downsample=True, upsample=True,
)


def write_tokenizer(folder: Path) -> None:
    """Letters as the whole vocabulary, in vocab.json and merges.txt; 8 tokens to a prompt."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(letter + "</w>" for letter in letters), "an</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\na n</w>\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 8, "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_generator(folder: Path) -> Path:
    """Written by the libraries' own means, not by save_generator, so that loading is tested against them."""
    import_torchvision()
    from diffusers import VQModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    transformer = MeissonicTransformer(**TRANSFORMER)
    torch.nn.init.normal_(transformer.mlm_layer.conv2.weight, std=0.3)
    (folder / "transformer").mkdir(parents=True)
    save_file(transformer.state_dict(), folder / "transformer/diffusion_pytorch_model.safetensors")
    config = {"_class_name": "Transformer2DModel", "guidance_embeds": False, "in_channels": 64, "patch_size": 1}
    config |= TRANSFORMER | {"sample_size": 4}
    (folder / "transformer/config.json").write_text(json.dumps(config), encoding="utf-8")
    VQModel(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4, sample_size=16, num_vq_embeddings=32,
        norm_num_groups=4, vq_embed_dim=4, mid_block_add_attention=False, lookup_from_codebook=True,
    ).save_pretrained(folder / "vqvae")
    text = CLIPTextConfig(
        vocab_size=55, hidden_size=24, intermediate_size=32, projection_dim=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=53, eos_token_id=54, pad_token_id=54,
    )
    CLIPTextModelWithProjection(text).save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "Scheduler", "mask_token_id": 39, "masking_schedule": "cosine"}
    scheduler |= {"num_inference_steps": 6, "guidance_scale": 3.0, "temperature": 1.5}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_generator_folder(tmp_path_factory) -> Path:
    """Read it only: tests that damage one take `damaged` copies."""
    return write_generator(tmp_path_factory.mktemp("generators") / "tiny")


@pytest.fixture(scope="session")
def tiny_generator(tiny_generator_folder):
    return load_generator(tiny_generator_folder)
