"""The picture tokenizer: diffusers' VQModel with a codebook made of the pictures' own 4x4 patches.

Codes come from k-means on patches, so that a thing gets the same tokens wherever it stands (places lie on a grid of
whole tokens); the decoder is trained on top and smooths what the patches cut, and the encoder is trained to name
the codes. A VQ-VAE trained from scratch in the same time was far worse.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from rich.progress import track
from torch import Tensor

from experiments.embedded import compose
from speedrl.files import write_atomically
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
    decoder_steps: int = 8000,
    encoder_steps: int = 2000,
    lr: float = 2e-3,
    seed: int = 0,
    save_every: int = 200,
    device: str = "cpu",
) -> None:
    """Trains on uint8 [N, 64, 64, 3] and saves to `out` a VQModel folder and `centres.pt`, float32 [codes, 48].

    First the decoder with the codes' embeddings, then the encoder. Resumes from `out/state.pt`.
    """
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    images = torch.from_numpy(pictures)
    if not (out / "centres.pt").exists():
        flat = torch.tensor([c * PATCH**2 for c in compose.COLOURS.values()]).float() / 127.5 - 1
        points = patches(images[:5000]).flatten(0, 1)
        drawn = points[torch.cdist(points, flat).amin(-1) > 0.5]
        drawn = drawn[torch.randperm(len(drawn))[:200_000]]
        found = kmeans(drawn, flat, codes=codes, seed=seed)
        write_atomically(out / "centres.pt", lambda partial: torch.save(found, partial))
    centres = torch.load(out / "centres.pt", weights_only=True).to(device)
    model = new_vqmodel(codes=codes, latent=latent).to(memory_format=torch.channels_last)
    # the codes start as whitened principal components of their patches
    centred = centres.cpu() - centres.cpu().mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    with torch.no_grad():
        projected = centred @ axes[:latent].T
        model.quantize.embedding.weight.copy_(projected / projected.std(0))
    model.to(device)
    decoding = [*model.decoder.parameters(), *model.post_quant_conv.parameters(), *model.quantize.parameters()]
    encoding = [*model.encoder.parameters(), *model.quant_conv.parameters()]
    optimizers = {
        "decoder": torch.optim.AdamW(decoding, lr=lr, weight_decay=1e-4),
        "encoder": torch.optim.AdamW(encoding, lr=lr),
    }
    last, done = {"decoder": decoder_steps, "encoder": encoder_steps}, 0
    if (out / "state.pt").exists():
        saved = torch.load(out / "state.pt", weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        for part, optimizer in optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][part])
        done = saved["done"]
        torch.manual_seed(seed + done)

    def decoder_loss(target: Tensor, index: Tensor) -> Tensor:
        codes_of = rearrange(model.quantize.embedding(index), "(n h w) c -> n c h w", h=16, w=16)
        picture = model.decoder(model.post_quant_conv(codes_of))
        sharp = sum((a - b).abs().mean() for a, b in zip(edges(picture), edges(target), strict=True))
        return (picture - target).abs().mean() + sharp

    def encoder_loss(target: Tensor, index: Tensor) -> Tensor:
        codebook = model.quantize.embedding.weight.detach()
        latents = rearrange(model.quant_conv(model.encoder(target)), "n c h w -> (n h w) c")
        # minus half the squared distance, but for a constant
        return F.cross_entropy(latents @ codebook.T - codebook.square().sum(-1) / 2, index)

    for number in track(range(done, sum(last.values())), "tokenizer of pictures"):
        part, step = ("decoder", number) if number < decoder_steps else ("encoder", number - decoder_steps)
        chosen = images[torch.randint(len(images), (batch,))].to(device)
        target = rearrange(chosen.float() / 127.5 - 1, "n h w c -> n c h w").contiguous(
            memory_format=torch.channels_last
        )
        loss = (decoder_loss if part == "decoder" else encoder_loss)(
            target, nearest(patches(chosen).flatten(0, 1), centres)
        )
        optimizer = optimizers[part]
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / last[part])) / 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoding if part == "decoder" else encoding, 1.0)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        if number % 50 == 0:
            print(f"{part} {step} loss {loss.item():.4f}", flush=True)
        if number % save_every == save_every - 1:
            value = {"model": model.state_dict(), "done": number + 1,
                     "optimizers": {name: one.state_dict() for name, one in optimizers.items()}}  # fmt: skip
            write_atomically(out / "state.pt", lambda partial, value=value: torch.save(value, partial))
    model.to("cpu").save_pretrained(out)
