"""The image tokenizer: learned vector quantisation, 16x16 tokens for 64x64 pixels, 1,024 codes.

Two trainings. The first makes the tokens: an encoder and a decoder that work at 16x16 only, where convolutions are
cheap, and the codebook. After a tenth of the updates without quantisation, k-means on the encoder's outputs makes the
codebook, which follows them by exponential moving averages from there on; codes that are hardly used are replaced. The
encoder normalises each position alone and sees 20x20 pixels, so that a thing gets the same tokens wherever it stands.

The second trains the decoder that is shipped, a VQModel of diffusers, on these tokens. It may go on while the base is
trained, and after that: the tokens stay. VQModel's own encoder is not trained, as nothing encodes images but this.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments.embedded import compose
from speedrl.system.files import write_atomically, write_json
from speedrl.system.platform import bf16_autocast, import_torchvision

CODES, GRID, PATCH = 1024, 16, 4
LATENT, WIDTH = 24, 128
CHANNELS = (16, 32, 96)  # of the VQModel, from 64x64 down to 16x16


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest centre: [M, D], [K, D] -> int64 [M]."""
    half = centres.square().sum(-1) / 2
    return torch.cat([(part @ centres.T - half).argmax(-1) for part in points.split(16384)])


def kmeans(points: Tensor, *, codes: int, iterations: int = 20) -> Tensor:
    """k-means centres [codes, D] of points [M, D]; an empty cluster starts again at a random point."""
    centres = points[torch.randint(len(points), (codes,))]
    for _ in range(iterations):
        index = nearest(points, centres)
        count = torch.bincount(index, minlength=codes).to(points.dtype)[:, None]
        total = torch.zeros_like(centres).index_add_(0, index, points)
        spare = points[torch.randint(len(points), (codes,))]
        centres = torch.where(count > 0, total / count.clamp(min=1), spare)
    return centres


class Mixer(nn.Module):
    """Residual 3x3 and 1x1 convolution, normalised at each position alone."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, 1, 1))
        self.near = nn.Conv2d(width, width, 3)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, H, W] -> [B, width, H, W]"""
        normal = (x * (x.float().square().mean(1, keepdim=True) + 1e-6).rsqrt() * self.scale).to(x.dtype)
        # the ground goes on beyond the border (torch.compile has no replicating padding for channels last)
        normal = torch.cat([normal[:, :, :1], normal, normal[:, :, -1:]], 2)
        normal = torch.cat([normal[..., :1], normal, normal[..., -1:]], 3)
        return x + self.out(F.silu(self.near(normal)))


class Tokens(nn.Module):
    """The encoder, the codebook as moving averages of the points nearest to each code, and the training's decoder."""

    def __init__(self, *, codes: int = CODES, latent: int = LATENT, width: int = WIDTH):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, PATCH, stride=PATCH), Mixer(width), Mixer(width), nn.Conv2d(width, latent, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, width, 1), *(Mixer(width) for _ in range(4)), nn.Conv2d(width, 3 * PATCH**2, 1)
        )
        self.register_buffer("count", torch.ones(codes))
        self.register_buffer("total", torch.randn(codes, latent))

    @property
    def centres(self) -> Tensor:
        """[codes, latent]"""
        return self.total / self.count[:, None]

    def encode(self, images: Tensor) -> Tensor:
        """What is quantised: float32 [B, 3, 64, 64] in [0, 1] -> float32 [B, 256, latent]."""
        return rearrange(self.encoder(images), "b d h w -> b (h w) d").float()

    def decode(self, points: Tensor) -> Tensor:
        """Images of [B, 256, latent]: float32 [B, 3, 64, 64]."""
        grid = rearrange(points, "b (h w) d -> b d h w", h=GRID).contiguous(memory_format=torch.channels_last)
        return rearrange(self.decoder(grid), "b (p q c) h w -> b c (h p) (w q)", p=PATCH, q=PATCH).float()

    @torch.no_grad()
    def restart(self, points: Tensor) -> None:
        """k-means on points [M, latent]."""
        self.total.copy_(kmeans(points, codes=len(self.count)))
        self.count.fill_(1.0)

    @torch.no_grad()
    def follow(self, points: Tensor, index: Tensor, *, decay: float = 0.98) -> None:
        """One update by points [M, latent] and their codes int64 [M]. Counts are in units of the mean use."""
        share = len(self.count) / len(points)
        self.count.lerp_(torch.bincount(index, minlength=len(self.count)) * share, 1 - decay)
        self.total.lerp_(torch.zeros_like(self.total).index_add_(0, index, points) * share, 1 - decay)

    @torch.no_grad()
    def replace_dead(self, points: Tensor, *, least: float = 0.02) -> int:
        """Puts codes that are used less than `least` of the mean at random points, and tells how many."""
        dead = (self.count < least).nonzero()[:, 0]
        self.total[dead] = points[torch.randint(len(points), (len(dead),), device=points.device)]
        self.count[dead] = 1.0
        return len(dead)


def new_vqmodel(*, codes: int = CODES, latent: int = LATENT, channels: tuple[int, ...] = CHANNELS) -> nn.Module:
    """A VQModel with random weights."""
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


def load_vqmodel(folder: Path) -> nn.Module:
    """A trained VQModel, in eval mode."""
    import_torchvision()
    from diffusers import VQModel

    model = VQModel.from_pretrained(folder)
    model.register_to_config(_name_or_path="")  # no folder of this machine in what is saved of it
    return model.eval().to(memory_format=torch.channels_last)


def load_tokens(folder: Path, *, device: str = "cpu") -> Tokens:
    """What `train_tokens` saved."""
    model = Tokens()
    model.load_state_dict({name: value.float() for name, value in load_file(folder / "tokens.safetensors").items()})
    return model.eval().to(device, memory_format=torch.channels_last)


def to_input(images: Tensor) -> Tensor:
    """uint8 [B, 64, 64, 3] -> float32 [B, 3, 64, 64] in [0, 1]."""
    return rearrange(images.float() / 255, "b h w c -> b c h w").contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def tokens_of(model: Tokens, images: Tensor, *, batch: int = 128) -> Tensor:
    """Tokens of uint8 [N, 64, 64, 3]: int64 [N, 256]."""
    device, found = model.total.device, []
    for part in images.split(batch):
        with bf16_autocast(device):
            points = model.encode(to_input(part.to(device)))
        found.append(nearest(points.flatten(0, 1), model.centres).view(len(part), -1).cpu())
    return torch.cat(found)


def decode(vqmodel: nn.Module, tokens: Tensor) -> Tensor:
    """Images of tokens int64 [B, 256] by the decoder that is shipped: float32 [B, 3, 64, 64]."""
    points = rearrange(vqmodel.quantize.embedding(tokens), "b (h w) d -> b d h w", h=GRID)
    points = points.contiguous(memory_format=torch.channels_last)
    return vqmodel.decoder(vqmodel.post_quant_conv(points)).float()


@torch.inference_mode()
def images_of(vqmodel: nn.Module, tokens: Tensor, *, batch: int = 128, label: str = "decoding") -> Tensor:
    """Images of tokens int64 [N, 256]: uint8 [N, 64, 64, 3]."""
    found = []
    for part in track(tokens.split(batch), label):
        images = decode(vqmodel, part.to(vqmodel.device))
        found.append((images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(found)


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, along both axes."""
    return images.diff(dim=-1), images.diff(dim=-2)


def distance(images: Tensor, target: Tensor) -> Tensor:
    """L1, squared error, and L1 of the edges, which keeps outlines sharp."""
    sharp = sum((a - b).abs().mean() for a, b in zip(edges(images), edges(target), strict=True))
    return (images - target).abs().mean() + 2 * (images - target).square().mean() + 0.5 * sharp


class Log:
    """Lines with the mean loss, PSNR, speed and time left of a training that began at update `first`."""

    def __init__(self, label: str, first: int, steps: int):
        self.label, self.first, self.steps = label, first, steps
        self.began, self.recent = time.monotonic(), []

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def add(self, step: int, loss: Tensor, error: Tensor, *, every: int = 25) -> None:
        """Loss and squared error of an update."""
        self.recent.append((loss.item(), error.item()))
        if step % every == every - 1:
            speed = (step + 1 - self.first) / self.seconds
            loss, error = np.mean(self.recent, 0)
            psnr, left = -10 * np.log10(error), (self.steps - step - 1) / speed / 60
            print(
                f"{self.label} {step + 1}/{self.steps} loss {loss:.4f}, {psnr:.1f} dB, {speed:.2f} steps/s, "
                f"{left:.0f} min left",
                flush=True,
            )
            self.recent = []


def effort(folder: Path, part: str) -> dict[str, float]:
    """Updates of the tokens or the decoder in a folder, and the seconds that they took, as far as recorded."""
    path = folder / f"{part}.json"
    return {"updates": 0, "seconds": 0.0} | (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})


def updates(folder: Path, part: str) -> int:
    """How many updates the tokens or the decoder in a folder have had; 0 where there are none."""
    return int(effort(folder, part)["updates"])


def restore(state: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Loads what `keep` wrote; returns the updates that it has had and the seconds that they took."""
    saved = torch.load(state, weights_only=True, map_location="cpu")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved.get("seconds", 0.0)


def keep(state: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, seconds: float) -> None:
    """Writes what a training goes on from."""
    value = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    write_atomically(state, lambda partial: torch.save(value, partial))


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, *, lr: float) -> None:
    """One update at the rate `lr`, its gradient clipped to norm 1."""
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = lr
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def train_tokens(
    images: np.ndarray,
    out: Path,
    *,
    steps: int = 2500,
    batch: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    save_every: int = 100,
    device: str = "cpu",
) -> None:
    """Trains `Tokens` on uint8 [N, 64, 64, 3] up to `steps` updates, at a rate that falls linearly, into
    out/tokens.safetensors.

    Resumes from `out/tokens.pt`, or goes on from the tokens in `out`, whose codes then keep about their meaning.
    """
    first, state, plain = updates(out, "tokens"), out / "tokens.pt", steps // 10
    seconds = effort(out, "tokens")["seconds"]
    if first >= steps:
        return
    began = first  # a finished training goes on: there is a codebook
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    pool = torch.from_numpy(images)
    model = load_tokens(out, device=device).train() if began else Tokens()
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=1e-4)
    if state.exists():
        first, seconds = restore(state, model, optimizer)
        torch.manual_seed(seed + first)

    def batch_of() -> Tensor:
        return to_input(pool[torch.randint(len(pool), (batch,))].to(device))

    autocast = bf16_autocast(device)

    @torch.compile
    def objective(target: Tensor, centres: Tensor, quantised: Tensor) -> tuple[Tensor, ...]:
        with autocast:
            points = model.encode(target)
        flat = points.detach().flatten(0, 1)  # in float32: many codes lie close together
        index = (flat @ centres.T - centres.square().sum(-1) / 2).argmax(-1)
        chosen = centres[index].view_as(points)
        codes = points + quantised * (chosen - points).detach()
        with autocast:
            found = model.decode(codes)
        loss = distance(found, target) + 0.25 * quantised * F.mse_loss(points, chosen)
        return loss, (found.detach() - target).square().mean(), flat, index

    log = Log("tokens", first, steps)
    for step in range(first, steps):
        if step == plain and not began:
            with torch.no_grad(), autocast:
                model.restart(torch.cat([model.encode(batch_of()).flatten(0, 1) for _ in range(16)]))
        quantised = step >= plain or bool(began)
        loss, error, flat, index = objective(batch_of(), model.centres, torch.tensor(float(quantised)))
        if quantised:
            model.follow(flat, index)
            if step % 40 == 0 and step < 0.8 * steps:
                model.replace_dead(flat)
        descend(loss, optimizer, lr=lr * min(1, (step + 1 - first) / 50, 1.02 - step / steps))
        log.add(step, loss.detach(), error)
        if step % save_every == save_every - 1:
            keep(state, model, optimizer, step=step + 1, seconds=seconds + log.seconds)
    tensors = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    write_atomically(out / "tokens.safetensors", lambda partial: save_file(tensors, partial))
    write_json(out / "tokens.json", {"updates": steps, "seconds": seconds + log.seconds})
    state.unlink(missing_ok=True)


def train_decoder(
    images: np.ndarray,
    out: Path,
    *,
    steps: int = 3000,
    batch: int = 16,
    lr: float = 2e-3,
    seed: int = 0,
    save_every: int = 100,
    device: str = "cpu",
) -> None:
    """Trains the decoder of a VQModel on the tokens of uint8 [N, 64, 64, 3] up to `steps` updates, at a rate that falls
    linearly, and saves its folder to `out`.

    `out` holds what `train_tokens` saved. Resumes from `out/decoder.pt`, or goes on from the decoder in `out`, which
    may be that of other tokens.
    """
    first, state = updates(out, "decoder"), out / "decoder.pt"
    seconds = effort(out, "decoder")["seconds"]
    if first >= steps:
        return
    torch.manual_seed(seed)
    pool, tokenizer = torch.from_numpy(images), load_tokens(out, device=device)
    tokens = tokens_of(tokenizer, pool)
    model = load_vqmodel(out) if (out / "config.json").exists() else new_vqmodel()
    with torch.no_grad():
        model.quantize.embedding.weight.copy_(tokenizer.centres)
    model = model.train().to(device, memory_format=torch.channels_last)
    learned = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=lr, betas=(0.9, 0.98), weight_decay=1e-4)
    if state.exists():
        first, seconds = restore(state, model, optimizer)
        torch.manual_seed(seed + first)
    log = Log("decoder", first, steps)
    for step in range(first, steps):
        index = torch.randint(len(pool), (batch,))
        target = to_input(pool[index].to(device))
        with bf16_autocast(device):
            found = decode(model, tokens[index].to(device))
        loss = distance(found, target)
        descend(loss, optimizer, lr=lr * min(1, (step + 1 - first) / 50, 1.02 - step / steps))
        log.add(step, loss.detach(), (found.detach() - target).square().mean())
        if step % save_every == save_every - 1:
            keep(state, model, optimizer, step=step + 1, seconds=seconds + log.seconds)
    model.to("cpu").save_pretrained(out)
    write_json(out / "decoder.json", {"updates": steps, "seconds": seconds + log.seconds})
    state.unlink(missing_ok=True)
