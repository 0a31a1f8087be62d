"""The embedded generator: the Meissonic transformer and its text encoder, trained together on composed emoji."""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.embedded import compose
from experiments.embedded.train_vq import PATCH, nearest, patches
from speedrl.models.checkpoint import Generator, save_generator
from speedrl.models.meissonic import MeissonicTransformer
from speedrl.system.files import write_atomically
from speedrl.system.platform import bf16_autocast, import_torchvision

WIDTH, WORDS, CODES, MASK = 192, 16, 1024, 1031
TRANSFORMER = dict(
    num_layers=1, num_single_layers=4, attention_head_dim=64, num_attention_heads=3, joint_attention_dim=WIDTH,
    pooled_projection_dim=WIDTH, axes_dims_rope=(8, 28, 28), vocab_size=MASK + 1, codebook_size=CODES,
    downsample=True, upsample=True,
)  # fmt: skip
# of a few tried, the best
SAMPLING = {"num_inference_steps": 32, "guidance_scale": 1.3, "temperature": 0.5, "negative_prompt": ""}


def token_tables(sprites: np.ndarray, centres: Tensor) -> dict[int, np.ndarray]:
    """Tokens of every thing on every colour, per size: int16 [concepts, styles, colours, size / 4, size / 4].

    Places are whole cells, so a picture's tokens are these blocks pasted on a flat ground: the same tokens that
    painting and encoding the picture gives, without painting it.
    """
    concepts, styles = sprites.shape[:2]
    tables = {}
    for size in (compose.SMALL, compose.BIG):
        side = size // 4
        table = np.zeros((concepts, styles, len(compose.COLOURS), side, side), np.int16)
        for thing in track(range(concepts), f"tokens at {size} pixels"):
            pictures = np.stack([
                compose.paint(compose.Picture((thing,), style, colour, (size,), ((0, 0),)), sprites)
                for style in range(styles) for colour in compose.COLOURS
            ])  # fmt: skip
            index = nearest(patches(torch.from_numpy(pictures)).flatten(0, 1), centres).numpy().reshape(-1, 16, 16)
            table[thing] = index[:, :side, :side].reshape(styles, -1, side, side)
        tables[size] = table
    return tables


def paste(picture: compose.Picture, tables: dict[int, np.ndarray]) -> np.ndarray:
    """Tokens of a picture: int16 [16, 16]."""
    colour = list(compose.COLOURS).index(picture.colour)
    grid = np.full((16, 16), CODES - len(compose.COLOURS) + colour, np.int16)
    for thing, size, (x, y) in zip(picture.things, picture.sizes, picture.places, strict=True):
        block = tables[size][thing, picture.style, colour]
        grid[y // 4 : (y + size) // 4, x // 4 : (x + size) // 4] = block
    return grid


def train_tokenizer(captions: list[str], out: Path, *, size: int = 2048) -> None:
    """A CLIPTokenizer of this vocabulary: byte-pair merges of the captions' words, in vocab.json and merges.txt."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    ends = ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Lowercase()
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2 * len(letters), end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), *ends]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    out.mkdir(parents=True, exist_ok=True)
    (out / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (out / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n", encoding="utf-8"
    )
    clip = CLIPTokenizer(vocab=str(out / "vocab.json"), merges=str(out / "merges.txt"), model_max_length=WORDS)
    clip.save_pretrained(out)


def tokenizer(names: list[str], tags: list[list[str]], out: Path, *, captions: int = 60_000, seed: int = 0) -> None:
    """Makes out/tokenizer from drawn captions, unless it is there."""
    if not (out / "tokenizer/vocab.json").exists():
        rng = np.random.default_rng(seed)
        texts = [compose.caption(compose.draw(rng, concepts=len(names)), names, tags, rng) for _ in range(captions)]
        train_tokenizer(texts, out / "tokenizer")


def new_text_encoder(tokenizer):
    import_torchvision()
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=WIDTH,
            num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=WORDS, hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, attn_implementation="eager",
        )
    )  # fmt: skip


def orthogonalised(matrix: Tensor, *, iterations: int = 5) -> Tensor:
    """The nearest orthogonal matrix, roughly, by Muon's Newton-Schulz iteration (kellerjordan.github.io/posts/muon).

    In float32: torch.optim.Muon iterates in bf16, which processors without it emulate a hundred times slower.
    """
    x = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if matrix.shape[-2] > matrix.shape[-1] else x


def shared(function: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    """function(stack), of which every process of torch.distributed computes its part: [N, ...] -> [N, ...]."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1:
        return function(stack)
    size = -(-len(stack) // ranks)
    padded = F.pad(stack, (0, 0, 0, 0, 0, size * ranks - len(stack)))
    parts = [torch.empty_like(padded[:size]) for _ in range(ranks)]
    dist.all_gather(parts, function(padded.chunk(ranks)[dist.get_rank()].contiguous()))
    return torch.cat(parts)[: len(stack)]


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for matrices, scaled to the size of AdamW's updates."""

    def __init__(self, parameters, *, lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape: dict[tuple, list] = {}
            for parameter in group["params"]:
                buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(buffer, group["momentum"])
                by_shape.setdefault(tuple(parameter.shape), []).append((parameter, ahead))
            for shape, pairs in by_shape.items():
                updates = shared(orthogonalised, torch.stack([update for _, update in pairs]))
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.add_(update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def read_pool(out: Path) -> dict[str, Tensor]:
    """What `make_pool` wrote: tokens int16 [N, 256] and caption ids int16 [N, WORDS]."""
    return load_file(out / "pool.safetensors")


def make_pool(
    tables: dict[int, np.ndarray],
    names: list[str],
    tags: list[list[str]],
    out: Path,
    *,
    pictures: int = 300_000,
    empty: float = 0.1,
    seed: int = 0,
) -> None:
    """Draws the pictures to train on into out/pool.safetensors, for `read_pool`, and trains out/tokenizer.

    A share `empty` of the captions is empty, for guidance.
    """
    from transformers import CLIPTokenizer

    tokenizer(names, tags, out)
    tokens_of, rng = CLIPTokenizer.from_pretrained(out / "tokenizer"), np.random.default_rng(seed)
    tokens, ids = np.empty((pictures, 256), np.int16), np.empty((pictures, WORDS), np.int16)
    for first in track(range(0, pictures, 1000), "compositions"):
        part = slice(first, min(first + 1000, pictures))
        drawn = [compose.draw(rng, concepts=len(names)) for _ in range(part.stop - part.start)]
        tokens[part] = np.stack([paste(picture, tables) for picture in drawn]).reshape(len(drawn), -1)
        captions = [compose.caption(picture, names, tags, rng) for picture in drawn]
        captions = ["" if rng.random() < empty else caption for caption in captions]
        ids[part] = tokens_of(
            captions, padding="max_length", truncation=True, max_length=WORDS, return_tensors="np"
        ).input_ids
    made = {"tokens": torch.from_numpy(tokens), "ids": torch.from_numpy(ids)}
    write_atomically(out / "pool.safetensors", lambda partial: save_file(made, partial))


def corrupt(tokens: Tensor, *, scored: int = 128) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masks a cosine-distributed share of each sample: (masked tokens [B, L], timestep [B], places [B, scored],
    weights [B, scored]). The loss is taken at `scored` of the masked places, all of them if they are fewer: first those
    of things, then some of the flat ones, which weigh for all of them.

    The timestep is the sampler's countdown, N - 1 - s of a step count N drawn from 1 to 64, log-uniform: the base
    sees every countdown beside every share of masked tokens, so that any step count is in its range.
    """
    (batch, length), device = tokens.shape, tokens.device
    # evenly spread over the batch: less noise from batch to batch
    progress = (torch.rand(1, device=device) + torch.arange(batch, device=device) / batch).remainder(1)
    count = (torch.cos(progress * math.pi / 2) * length).ceil().clamp(min=1)
    masked = torch.rand(batch, length, device=device).argsort(-1) < count[:, None]
    steps = torch.exp(torch.rand(batch, device=device) * math.log(64.99)).floor()
    timestep = steps - 1 - (progress * steps).floor()
    ground = tokens >= CODES - len(compose.FLAT)
    places = (torch.rand(batch, length, device=device) + ground).masked_fill(~masked, 3).argsort(-1)[:, :scored]
    of_ground, used = ground.gather(1, places), masked.gather(1, places)
    share = (ground & masked).sum(-1, keepdim=True) / (of_ground & used).sum(-1, keepdim=True).clamp(min=1)
    return torch.where(masked, MASK, tokens), timestep, places, used * torch.where(of_ground, share, 1.0)


def train(
    data: dict[str, Tensor],
    out: Path,
    *,
    steps: int,
    batch: int = 64,
    lr: float = 1.6e-3,
    decay: float = 0.998,
    seed: int = 0,
    save_every: int = 250,
    device: str = "cpu",
) -> None:
    """Trains on `data`, of `read_pool`, for `steps` updates of `batch` pictures, with Muon on matrices and AdamW on the
    rest; resumes from `out/state.pt`.

    The rate rises over 100 steps and falls linearly to 0. What counts in the end is the exponential moving average of
    the weights. Under torch.distributed each process takes its share of a batch.
    """
    from transformers import CLIPTokenizer

    torch.manual_seed(seed)
    tokens_of = CLIPTokenizer.from_pretrained(out / "tokenizer")
    transformer, text_encoder = MeissonicTransformer(**TRANSFORMER), new_text_encoder(tokens_of)
    model = torch.nn.ModuleDict({"transformer": transformer, "text": text_encoder})
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02)
    for block in (*model["transformer"].transformer_blocks, *model["transformer"].single_transformer_blocks):
        for name, module in block.named_modules():
            if name.startswith("norm") and isinstance(module, torch.nn.Linear):
                torch.nn.init.zeros_(module.weight)  # blocks start as identities
                torch.nn.init.zeros_(module.bias)
    torch.nn.init.normal_(model["transformer"].mlm_layer.conv2.weight, std=0.02)
    model.to(device)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ("_blocks." in name or ".layers." in name)]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        Muon(matrices, lr=lr),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    # a process a core beats threads: one sum of gradients a step in place of a barrier at every operation
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    batch //= ranks
    torch.manual_seed(seed + 1000 * rank)
    data = {name: value.to(device) for name, value in data.items()}
    first, state = 0, out / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        average = {name: value.to(device) for name, value in saved["average"].items()}
        for optimizer, value in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(value)
        first = saved["step"]
        torch.manual_seed(seed + 1000 * rank + first)
    learned = [p for p in model.parameters() if p.requires_grad]
    micro = torch.tensor([[compose.SIDE, compose.SIDE, 0.0, 0.0, 6.0]], device=device).expand(batch, -1)
    autocast = bf16_autocast(device)

    @torch.compile
    def objective(tokens, ids, noisy, timestep, places, weights) -> Tensor:
        with autocast:
            text = model["text"](ids, output_hidden_states=True)
            features = model["transformer"].features(
                noisy.view(-1, 16, 16), timestep, text.hidden_states[-2], text.text_embeds, micro
            )
            logits = model["transformer"].head(features.gather(1, places[..., None].expand(-1, -1, features.shape[-1])))
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.gather(1, places).flatten(), reduction="none")
        return (loss * weights.flatten()).sum() / weights.sum()

    began, recent = time.time(), []
    for step in range(first, steps):
        rate = lr * min((step + 1) / 100, (steps - step) / steps)
        drawn = torch.randint(len(data["ids"]), (batch,), device=device)
        tokens, ids = data["tokens"][drawn].long(), data["ids"][drawn].long()
        loss = objective(tokens, ids, *corrupt(tokens))
        loss.backward()
        if ranks > 1:
            gradient = torch.cat([p.grad.flatten() for p in learned])
            dist.all_reduce(gradient)
            for p, part in zip(learned, gradient.div_(ranks).split([p.numel() for p in learned]), strict=True):
                p.grad.copy_(part.view_as(p))
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            keep = min(decay, (step + 1) / (step + 10))
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 1 - keep) if value.is_floating_point() else average[name].copy_(value)
        recent.append(loss.detach())
        if step % 25 == 24 and rank == 0:
            speed = (step + 1 - first) / (time.time() - began)
            left = f"{(steps - step) / speed / 60:.0f} min left"
            print(
                f"base {step + 1}/{steps} loss {torch.stack(recent).mean():.3f} {speed:.2f} steps/s {left}", flush=True
            )
            recent = []
        if (step % save_every == save_every - 1 or step == steps - 1) and rank == 0:
            value = {"model": model.state_dict(), "average": average, "step": step + 1,
                     "optimizers": [optimizer.state_dict() for optimizer in optimizers]}  # fmt: skip
            write_atomically(state, lambda partial, value=value: torch.save(value, partial))


def export(base: Path, vq: Path, out: Path) -> None:
    """The averaged weights of `base/state.pt`, the tokenizer and the VQModel as a generator's folder, in float16."""
    import_torchvision()
    from diffusers import VQModel
    from transformers import CLIPTokenizer

    average = torch.load(base / "state.pt", weights_only=True, map_location="cpu")["average"]
    tokens_of = CLIPTokenizer.from_pretrained(base / "tokenizer")
    transformer, text = MeissonicTransformer(**TRANSFORMER), new_text_encoder(tokens_of)
    for name, module in (("transformer.", transformer), ("text.", text)):
        module.load_state_dict({k.removeprefix(name): v for k, v in average.items() if k.startswith(name)})
    side = compose.SIDE // PATCH
    config = {"_class_name": "Transformer2DModel", "guidance_embeds": False, "in_channels": WIDTH, "patch_size": 1,
              "sample_size": side} | TRANSFORMER  # fmt: skip
    scheduler = {"_class_name": "Scheduler", "mask_token_id": MASK, "masking_schedule": "cosine"} | SAMPLING
    generator = Generator(
        transformer, VQModel.from_pretrained(vq), text, tokens_of, config, scheduler, (side, side), (compose.SIDE,) * 2,
        MASK, CODES, steps=SAMPLING["num_inference_steps"], guidance=SAMPLING["guidance_scale"],
        temperature=SAMPLING["temperature"], negative="", micro_conds=(),
    )  # fmt: skip
    fresh = base / "generator"
    save_generator(generator, fresh, dtype=torch.float16)
    out.mkdir(parents=True, exist_ok=True)
    for folder in fresh.iterdir():  # beside the reward and the judge, which stay
        shutil.rmtree(out / folder.name, ignore_errors=True)
        shutil.move(folder, out / folder.name)
