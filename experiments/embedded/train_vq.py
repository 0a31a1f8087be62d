"""The picture tokenizer: diffusers' VQModel with a codebook made of the pictures' own 4x4 patches.

Codes come from k-means on patches, so that a thing gets the same tokens wherever it stands (places lie on a grid of
whole tokens); the decoder is trained on top and smooths what the patches cut, and the encoder is trained to name
the codes. A VQ-VAE trained from scratch in the same time was far worse.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from rich.progress import track
from torch import Tensor

from experiments.embedded import compose
from speedrl.platform import import_torchvision

PATCH = 4


def patches(pictures: Tensor) -> Tensor:
    """uint8 [N, 64, 64, 3] -> float32 [N, 256, 48] in [-1, 1]."""
    return rearrange(pictures.float() / 127.5 - 1, "n (h p) (w q) c -> n (h w) (p q c)", p=PATCH, q=PATCH)


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest centre: [M, D], [K, D] -> int64 [M]."""
    half = centres.square().sum(-1) / 2
    return torch.cat([(part @ centres.T - half).argmax(-1) for part in points.split(16384)])


def kmeans(points: Tensor, flat: Tensor, *, codes: int, iterations: int = 25, seed: int = 0) -> Tensor:
    """k-means centres [codes, D], the last of them the flat colours, which fill pictures and must be exact."""
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(len(points), generator=generator)[: codes - len(flat)]].clone()
    for _ in track(range(iterations), "codebook"):
        index = nearest(points, centres)
        count = torch.bincount(index, minlength=len(centres)).float()[:, None]
        total = torch.zeros_like(centres).index_add_(0, index, points)
        spare = points[torch.randint(len(points), (len(centres),), generator=generator)]
        centres = torch.where(count > 0, total / count.clamp(min=1), spare)
    return torch.cat([centres, flat])


def new_vqmodel(*, codes: int = 1024, latent: int = 24, channels: tuple[int, ...] = (16, 32, 64)):
    import_torchvision()
    from diffusers import VQModel

    return VQModel(
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent,
        sample_size=compose.SIDE,
        num_vq_embeddings=codes,
        norm_num_groups=8,
        vq_embed_dim=latent,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )


def edges(pictures: Tensor) -> tuple[Tensor, Tensor]:
    return pictures.diff(dim=-1), pictures.diff(dim=-2)


def train(
    pictures: np.ndarray,
    out: Path,
    *,
    codes: int = 1024,
    latent: int = 24,
    batch: int = 16,
    decoder_steps: int = 1600,
    encoder_steps: int = 300,
    lr: float = 2e-3,
    seed: int = 0,
) -> None:
    """Trains on uint8 [N, 64, 64, 3] and saves to `out` a VQModel folder and `centres.pt`, float32 [codes, 48]."""
    torch.manual_seed(seed)
    pictures = torch.from_numpy(pictures)
    flat = torch.tensor([c * PATCH**2 for c in compose.COLOURS.values()]).float() / 127.5 - 1
    points = patches(pictures[:5000]).flatten(0, 1)
    drawn = points[torch.cdist(points, flat).amin(-1) > 0.5]
    drawn = drawn[torch.randperm(len(drawn))[:200_000]]
    centres = kmeans(drawn, flat, codes=codes, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    torch.save(centres, out / "centres.pt")

    model = new_vqmodel(codes=codes, latent=latent).to(memory_format=torch.channels_last)
    # the codes start as whitened principal components of their patches
    centred = centres - centres.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    with torch.no_grad():
        projected = centred @ axes[:latent].T
        model.quantize.embedding.weight.copy_(projected / projected.std(0))

    def batches(steps: int, label: str):
        for step in track(range(steps), label):
            chosen = pictures[torch.randint(len(pictures), (batch,))]
            target = rearrange(chosen.float() / 127.5 - 1, "n h w c -> n c h w")
            index = nearest(patches(chosen).flatten(0, 1), centres)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 50) * (0.02 + 0.98 * (1 + np.cos(np.pi * step / steps)) / 2)
            yield step, target, index

    def lookup(index: Tensor) -> Tensor:
        return rearrange(model.quantize.embedding(index), "(n h w) c -> n c h w", h=16, w=16)

    optimizer = torch.optim.AdamW([*model.decoder.parameters(), *model.post_quant_conv.parameters(),
                                   *model.quantize.parameters()], lr=lr, weight_decay=1e-4)  # fmt: skip
    for step, target, index in batches(decoder_steps, "decoder"):
        picture = model.decoder(model.post_quant_conv(lookup(index)))
        sharp = sum((a - b).abs().mean() for a, b in zip(edges(picture), edges(target), strict=True))
        loss = (picture - target).abs().mean() + sharp
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"decoder {step} {loss.item():.4f}", flush=True)
        if step % 400 == 399:
            model.save_pretrained(out)

    optimizer = torch.optim.AdamW([*model.encoder.parameters(), *model.quant_conv.parameters()], lr=lr)
    codebook = model.quantize.embedding.weight.detach()
    for step, target, index in batches(encoder_steps, "encoder"):
        latents = rearrange(model.quant_conv(model.encoder(target)), "n c h w -> (n h w) c")
        # minus half the squared distance, but for a constant
        logits = latents @ codebook.T - codebook.square().sum(-1) / 2
        loss = F.cross_entropy(logits, index)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            right = (logits.argmax(-1) == index).float().mean().item()
            print(f"encoder {step} {loss.item():.4f} {right:.3f}", flush=True)
    model.save_pretrained(out)
