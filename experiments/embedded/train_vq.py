"""The picture tokenizer: diffusers' VQModel with a codebook made of the pictures' own 4x4 patches.

Codes come from k-means on patches, so that a thing gets the same tokens wherever it stands (places lie on a grid of
whole tokens). The encoder's weights are written down: it takes each patch's principal components. The decoder is
trained on top and smooths what the patches cut. A VQ-VAE trained from scratch in the same time was far worse.
"""

import math
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from rich.progress import track
from torch import Tensor

from experiments.embedded import compose
from speedrl.system.files import write_atomically
from speedrl.system.platform import import_torchvision

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


@torch.no_grad()
def write_encoder(model, axes: Tensor, mean: Tensor, *, constant: float = 256.0) -> None:
    """Makes the encoder give each patch's coordinates (patch - mean) @ axes.T, axes [24, 48] and mean [48] in the
    order of `patches`: the nearest code is then that of `nearest` but for what lies outside of the axes.

    Pixels go through the two strided convolutions, space to depth, past residual blocks that add nothing. The last
    normalisation does no harm as every coordinate stands beside its negative and each group holds two large constants;
    SiLU does none as silu(z) - silu(-z) = z.
    """
    encoder, (latent, groups) = model.encoder, (len(axes), model.config.norm_num_groups)
    for parameter in (*encoder.parameters(), *model.quant_conv.parameters()):
        parameter.zero_()
    for channel in range(3):
        encoder.conv_in.weight[channel, channel, 1, 1], encoder.conv_in.bias[channel] = 2, -1  # [0, 1] to [-1, 1]
    first, second, third = encoder.down_blocks
    for row, column, channel in np.ndindex(2, 2, 3):  # 2x2 pixels -> 12 channels
        first.downsamplers[0].conv.weight[(row * 2 + column) * 3 + channel, channel, row, column] = 1
    second.resnets[0].conv_shortcut.weight[:12, :12, 0, 0] = torch.eye(12)
    weight = second.downsamplers[0].conv.weight
    for index, (row, column, channel) in enumerate(np.ndindex(PATCH, PATCH, 3)):
        weight[:latent, (row % 2 * 2 + column % 2) * 3 + channel, row // 2, column // 2] = axes[:, index]
    second.downsamplers[0].conv.bias[:latent] = -axes @ mean
    spread, width = third.resnets[0].conv_shortcut, len(encoder.conv_norm_out.weight) // groups
    held = latent // groups  # coordinates in each group
    for group, part in np.ndindex(groups, held):
        here, coordinate = group * width + 2 * part, group * held + part
        spread.weight[here, coordinate], spread.weight[here + 1, coordinate] = 1, -1
        encoder.conv_out.weight[coordinate, here, 1, 1], encoder.conv_out.weight[coordinate, here + 1, 1, 1] = 1, -1
    for group in range(groups):
        spread.bias[group * width + 2 * held], spread.bias[group * width + 2 * held + 1] = constant, -constant
    encoder.conv_norm_out.weight[:] = constant * (2 / width) ** 0.5  # what a group's deviation is
    model.quant_conv.weight[:, :, 0, 0] = torch.eye(latent)


def edges(pictures: Tensor) -> tuple[Tensor, Tensor]:
    return pictures.diff(dim=-1), pictures.diff(dim=-2)


def codebook(pictures: np.ndarray, path: Path, *, codes: int = 1024, seed: int = 0) -> Tensor:
    """k-means centres of the patches of uint8 [N, 64, 64, 3], float32 [codes, 48], kept in `path`."""
    if not path.exists():
        torch.manual_seed(seed)
        flat = torch.tensor([c * PATCH**2 for c in compose.FLAT]).float() / 127.5 - 1
        points = patches(torch.from_numpy(pictures[:5000])).flatten(0, 1)
        drawn = points[torch.cdist(points, flat).amin(-1) > 0.5]
        drawn = drawn[torch.randperm(len(drawn))[:200_000]]
        centres = kmeans(drawn, flat, codes=codes, seed=seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda partial: torch.save(centres, partial))
    return torch.load(path, weights_only=True)


def train(
    pictures: np.ndarray,
    centres: Tensor,
    out: Path,
    *,
    latent: int = 24,
    steps: int = 8000,
    batch: int = 16,
    lr: float = 2e-3,
    noise: float = 1.0,
    seed: int = 0,
    save_every: int = 200,
    device: str = "cpu",
) -> None:
    """Trains a decoder of the codes `centres` on uint8 [N, 64, 64, 3] and saves a VQModel's folder to `out`.

    Pictures in and out are in [0, 1], as Meissonic's. So that the decoder forgives a generator's small errors, a random
    share of each picture's codes are drawn anew, in proportion to exp(-squared distance / noise) of their patches in
    [-1, 1]. Resumes from `out/state.pt`.
    """
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    images = torch.from_numpy(pictures)
    model = new_vqmodel(codes=len(centres), latent=latent)
    mean = centres.mean(0)
    axes = torch.linalg.svd(centres - mean, full_matrices=False)[2][:latent]
    write_encoder(model, axes, mean)
    with torch.no_grad():
        model.quantize.embedding.weight.copy_((centres - mean) @ axes.T)
    model.to(memory_format=torch.channels_last).to(device)
    centres = centres.to(device)
    learned = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=1e-4)
    done = 0
    if (out / "state.pt").exists():
        saved = torch.load(out / "state.pt", weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["done"]
        torch.manual_seed(seed + done)

    near = torch.softmax(-torch.cdist(centres, centres).square() / noise, -1)
    near[-len(compose.FLAT) :] = torch.eye(len(centres), device=device)[-len(compose.FLAT) :]  # grounds stay
    reached = near.cumsum(-1)

    def objective(target: Tensor, index: Tensor) -> Tensor:
        share = torch.rand(batch, 1, device=device).expand(-1, index.numel() // batch).flatten()
        other = torch.searchsorted(reached[index], torch.rand(len(index), 1, device=device))[:, 0]
        other = other.clamp(max=len(centres) - 1)
        index = torch.where(torch.rand(index.shape, device=device) < share, other, index)
        codes_of = rearrange(model.quantize.embedding(index), "(n h w) c -> n c h w", h=16, w=16).detach()
        picture = model.decoder(model.post_quant_conv(codes_of))
        sharp = sum((a - b).abs().mean() for a, b in zip(edges(picture), edges(target), strict=True))
        return 2 * ((picture - target).abs().mean() + sharp)

    for step in track(range(done, steps), "tokenizer of pictures"):
        chosen = images[torch.randint(len(images), (batch,))].to(device)
        target = rearrange(chosen.float() / 255, "n h w c -> n c h w").contiguous(memory_format=torch.channels_last)
        loss = objective(target, nearest(patches(chosen).flatten(0, 1), centres))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            print(f"decoder {step}/{steps} loss {loss.item():.4f}", flush=True)
        if step % save_every == save_every - 1:
            value = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": step + 1}
            write_atomically(out / "state.pt", lambda partial, value=value: torch.save(value, partial))
    model.to("cpu").save_pretrained(out)
