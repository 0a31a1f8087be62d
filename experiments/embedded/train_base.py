"""The embedded generator: the Meissonic transformer and its text encoder, trained together on composed emoji.

The learning rate warms up, stays constant, and falls over the last updates of the last stage. So a training can go on
in a later session, from a checkpoint or from the weights of a finished stage.
"""

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
from experiments.embedded.train_vq import CODES, GRID, load_tokens, load_vqmodel, tokens_of
from speedrl.method.sampler import Sampler
from speedrl.models.generator import Generator
from speedrl.models.loading import save_generator
from speedrl.models.meissonic import MeissonicTransformer
from speedrl.system.files import write_atomically, write_json
from speedrl.system.platform import bf16_autocast, import_torchvision

WIDTH, WORDS, MASK = 192, 16, CODES
TRANSFORMER = dict(
    num_layers=1, num_single_layers=4, attention_head_dim=64, num_attention_heads=3, joint_attention_dim=WIDTH,
    pooled_projection_dim=WIDTH, axes_dims_rope=(8, 28, 28), vocab_size=MASK + 1, codebook_size=CODES,
    downsample=True, upsample=True,
)
# what `measure` found; at low temperatures a base that is trained little fills images with their ground, one token
SAMPLING = {
    "num_inference_steps": 32, "guidance_scale": 1.5, "temperature": 4.0, "remask_share": 0.75, "negative_prompt": "",
}


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
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (out / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
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
    )


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


def placements() -> tuple[list[tuple[int, tuple[int, int]]], Tensor]:
    """Every size and place that an image may have, and how often each is drawn, float32 [placements]."""
    sizes = {compose.SMALL: compose.SMALL_SHARE, compose.BIG: 1 - compose.SMALL_SHARE}
    found = [(size, place) for size in sizes for place in compose.places(size)]
    return found, torch.tensor([sizes[size] / len(compose.places(size)) for size, _ in found])


def read_pool(out: Path) -> dict[str, Tensor]:
    """What `make_pool` wrote: tokens int16 [N, 256] and captions' ids int16 [N, captions, WORDS]."""
    return load_file(out / "pool.safetensors")


def make_pool(
    sprites: np.ndarray, names: list[str], tags: list[list[str]], vq: Path, out: Path,
    *, captions: int = 4, seed: int = 0, device: str = "cpu",
) -> None:
    """Writes all images that can be composed, as tokens, to out/pool.safetensors, for `read_pool`.

    In the order thing, design, ground, placement: all `placements` of one stand beside each other. Each image has
    `captions` captions. Trains out/tokenizer.
    """
    from transformers import CLIPTokenizer

    tokenizer(names, tags, out)
    words, rng = CLIPTokenizer.from_pretrained(out / "tokenizer"), np.random.default_rng(seed)
    model, (placed, _) = load_tokens(vq, device=device), placements()
    count = len(compose.STYLES) * len(compose.COLOURS) * len(placed)  # images of one thing
    tokens = torch.empty(len(names), count, GRID**2, dtype=torch.int16)
    ids = torch.empty(len(names), count, captions, WORDS, dtype=torch.int16)
    for thing in track(range(len(names)), "base: tokens of all images"):
        contents = [
            compose.Composition(thing, style, colour, *placement)
            for style in range(len(compose.STYLES)) for colour in compose.COLOURS for placement in placed
        ]
        painted = torch.from_numpy(np.stack([compose.paint(content, sprites) for content in contents]))
        tokens[thing] = tokens_of(model, painted)
        texts = [compose.caption(content, names, tags, rng) for content in contents for _ in range(captions)]
        texts = words(texts, padding="max_length", truncation=True, max_length=WORDS, return_tensors="pt")
        ids[thing] = texts.input_ids.unflatten(0, (count, captions))
    made = {"tokens": tokens.flatten(0, 1), "ids": ids.flatten(0, 1)}
    write_atomically(out / "pool.safetensors", lambda partial: save_file(made, partial))


def draw_batch(data: dict[str, Tensor], empty: Tensor, weight: Tensor, *, batch: int, share: float = 0.1):
    """Tokens int64 [batch, 256] and caption ids int64 [batch, WORDS] of `data`, placements drawn by `weight`.

    A share of the captions is `empty`, int64 [WORDS], for guidance.
    """
    tokens, ids = data["tokens"], data["ids"]
    device = tokens.device
    index = torch.randint(len(tokens) // len(weight), (batch,), device=device) * len(weight)
    index = index + torch.multinomial(weight, batch, replacement=True)
    chosen = ids[index, torch.randint(ids.shape[1], (batch,), device=device)].long()
    said = torch.rand(batch, 1, device=device) >= share
    return tokens[index].long(), torch.where(said, chosen, empty)


def corrupt(tokens: Tensor, *, scored: int = 128) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masks a cosine-distributed share of each sample: (masked tokens [B, L], timestep [B], places [B, scored],
    weights [B, scored]). The loss is taken at `scored` of the masked places, which weigh for all of them.

    The timestep is the sampler's countdown, N - 1 - s of a step count N drawn from 1 to 64, log-uniform: the base
    sees every countdown beside every share of masked tokens, so that any step count is in its range.
    """
    (batch, length), device = tokens.shape, tokens.device
    # evenly spread over the batch: less noise from batch to batch
    progress = (torch.rand(1, device=device) + torch.arange(batch, device=device) / batch).remainder(1)
    count = (torch.cos(progress * math.pi / 2) * length).ceil().clamp(min=1).long()
    order = torch.rand(batch, length, device=device).argsort(-1)  # the first `count` of it are masked
    masked = order.argsort(-1) < count[:, None]
    steps = torch.exp(torch.rand(batch, device=device) * math.log(64.99)).floor()
    timestep = steps - 1 - (progress * steps).floor()
    used = torch.arange(scored, device=device) < count[:, None]
    weights = used * (count / used.sum(-1))[:, None]
    return torch.where(masked, MASK, tokens), timestep, order[:, :scored], weights


def rate(step: int, *, first: int, steps: int, decay: int, warmup: int = 100) -> float:
    """The learning rate of an update, as a share of the highest: from `first` on it rises over `warmup` updates, stays,
    and falls linearly to 0 over the last `decay` of `steps`."""
    return min(1.0, (step - first + 1) / warmup, (steps - step) / decay if decay else 1.0)


def new_model(words) -> torch.nn.ModuleDict:
    """Transformer and text encoder with random weights; every block starts as the identity."""
    model = torch.nn.ModuleDict({"transformer": MeissonicTransformer(**TRANSFORMER), "text": new_text_encoder(words)})
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02)
    for block in (*model["transformer"].transformer_blocks, *model["transformer"].single_transformer_blocks):
        for name, module in block.named_modules():
            if name.startswith("norm") and isinstance(module, torch.nn.Linear):
                torch.nn.init.zeros_(module.weight)
                torch.nn.init.zeros_(module.bias)
    torch.nn.init.normal_(model["transformer"].mlm_layer.conv2.weight, std=0.02)
    return model


def optimizers_of(model: torch.nn.Module, *, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ("_blocks." in name or ".layers." in name)]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


@torch.no_grad()
def follow(average: dict[str, Tensor], model: torch.nn.Module, keep: float) -> None:
    """Moves the moving average of the weights."""
    for name, value in model.state_dict().items():
        average[name].lerp_(value, 1 - keep) if value.is_floating_point() else average[name].copy_(value)


def mean_gradient(learned: list[torch.nn.Parameter], ranks: int) -> None:
    """Replaces every gradient by its mean over the processes."""
    gradient = torch.cat([p.grad.flatten() for p in learned])
    dist.all_reduce(gradient)
    for p, part in zip(learned, gradient.div_(ranks).split([p.numel() for p in learned]), strict=True):
        p.grad.copy_(part.view_as(p))


def train(
    data: dict[str, Tensor],
    out: Path,
    *,
    steps: int,
    decay: int = 0,
    minutes: float = math.inf,
    batch: int = 64,
    lr: float = 1.6e-3,
    ema: float = 0.999,
    seed: int = 0,
    save_every: int = 250,
    device: str = "cpu",
) -> int:
    """Trains on `data`, of `read_pool`, up to `steps` updates of `batch` images, or for `minutes`, and returns the
    number of updates that the weights have had.

    Goes on from `out/state.pt`, or from a stage's weights, `out/start.safetensors` with `out/start.json`. The rate is
    that of `rate`. What counts in the end is the exponential moving average of the weights.
    Under torch.distributed each process takes its share of a batch.
    """
    from transformers import CLIPTokenizer

    torch.manual_seed(seed)
    words = CLIPTokenizer.from_pretrained(out / "tokenizer")
    model = new_model(words).to(device)
    optimizers = optimizers_of(model, lr=lr)
    # a process a core beats threads: one sum of gradients a step in place of a barrier at every operation
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    batch //= ranks
    data = {name: value.to(device) for name, value in data.items()}
    done, first, seconds, state, start = 0, 0, 0.0, out / "state.pt", out / "start.safetensors"
    if not state.exists() and start.exists():
        model.load_state_dict({name: value.float() for name, value in load_file(start).items()}, strict=False)
        stage = json.loads((out / "start.json").read_text(encoding="utf-8"))
        done, first, seconds = stage["updates"], stage["updates"], stage.get("seconds", 0.0)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if state.exists():
        saved = torch.load(state, weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        average = saved["average"]
        for optimizer, value in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(value)
        done, first, seconds = saved["step"], saved["first"], saved.get("seconds", 0.0)
    torch.manual_seed(seed + 1000 * rank + done)
    learned = [p for p in model.parameters() if p.requires_grad]
    micro = torch.tensor([[compose.SIDE, compose.SIDE, 0.0, 0.0, 6.0]], device=device).expand(batch, -1)
    empty = words("", padding="max_length", max_length=WORDS, return_tensors="pt").input_ids[0].to(device)
    weight, autocast = placements()[1].to(device), bf16_autocast(device)

    @torch.compile
    def objective(tokens, ids, noisy, timestep, places, weights) -> Tensor:
        with autocast:
            text = model["text"](ids, output_hidden_states=True)
            features = model["transformer"].features(
                noisy.view(-1, GRID, GRID), timestep, text.hidden_states[-2], text.text_embeds, micro
            )
            logits = model["transformer"].head(features.gather(1, places[..., None].expand(-1, -1, features.shape[-1])))
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.gather(1, places).flatten(), reduction="none")
        return (loss * weights.flatten()).sum() / weights.sum()

    def save(step: int) -> None:
        value = {"model": model.state_dict(), "average": average, "step": step, "first": first,
                 "seconds": seconds + time.monotonic() - began,
                 "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        write_atomically(state, lambda partial: torch.save(value, partial))

    began, recent, over = time.monotonic(), [], torch.zeros(1)
    for step in range(done, steps):
        tokens, ids = draw_batch(data, empty, weight, batch=batch)
        loss = objective(tokens, ids, *corrupt(tokens))
        loss.backward()
        if ranks > 1:
            mean_gradient(learned, ranks)
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(step, first=first, steps=steps, decay=decay)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        follow(average, model, min(ema, (step + 1 - first) / (step + 10 - first)))
        recent.append(loss.detach())
        if step % 25 == 24:
            passed = time.monotonic() - began
            over.fill_(passed > 60 * minutes)
            if ranks > 1:
                dist.broadcast(over, 0)  # all stop at the same update
            if rank == 0:
                speed = (step + 1 - done) / passed
                left = max(0, min((steps - step - 1) / speed / 60, minutes - passed / 60))
                print(
                    f"base {step + 1}/{steps} loss {torch.stack(recent).mean():.3f}, {speed:.2f} steps/s, "
                    f"{left:.0f} min left",
                    flush=True,
                )
            recent = []
        stops = step == steps - 1 or bool(over)
        if rank == 0 and (step % save_every == save_every - 1 or stops):
            save(step + 1)
        if stops:
            return step + 1
    return max(done, steps)


def effort(base: Path) -> dict[str, float]:
    """Updates of the weights of `base/state.pt`, and the seconds that they took, as far as they were recorded."""
    saved = torch.load(base / "state.pt", weights_only=True, map_location="cpu", mmap=True)
    return {"updates": saved["step"], "seconds": saved.get("seconds", 0.0)}


def average_of(base: Path) -> dict[str, Tensor]:
    """The averaged weights of `base/state.pt`."""
    return torch.load(base / "state.pt", weights_only=True, map_location="cpu")["average"]


def save_stage(base: Path, vq: Path, out: Path) -> None:
    """What a later session goes on from, in float16: the averaged weights, both tokenizers, the number of updates."""
    saved = torch.load(base / "state.pt", weights_only=True, map_location="cpu")
    weights = {name: v.half() if v.is_floating_point() else v for name, v in saved["average"].items()}
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "base.safetensors", lambda partial: save_file(weights, partial))
    write_json(out / "base.json", effort(base))
    shutil.copytree(base / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    (out / "vq").mkdir(exist_ok=True)
    for name in ("tokens.safetensors", "tokens.json", "decoder.json"):
        shutil.copy(vq / name, out / "vq")
    load_vqmodel(vq).half().save_pretrained(out / "vq")


def load_stage(stage: Path, base: Path, vq: Path) -> None:
    """Puts what `save_stage` wrote where the stages look for it, unless something is there. A stage may end with the
    tokens, before any base."""
    if not (vq / "tokens.safetensors").exists():
        shutil.copytree(stage / "vq", vq, dirs_exist_ok=True)
    if not (base / "tokenizer/vocab.json").exists():
        shutil.copytree(stage / "tokenizer", base / "tokenizer", dirs_exist_ok=True)
    for name in ("safetensors", "json"):
        if (stage / f"base.{name}").exists() and not (base / f"start.{name}").exists():
            shutil.copy(stage / f"base.{name}", base / f"start.{name}")


def export(base: Path, vq: Path, out: Path) -> None:
    """The averaged weights, the tokenizer and the VQModel as a generator's folder, in float16."""
    from transformers import CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(base / "tokenizer")
    model = new_model(words)
    model.load_state_dict(average_of(base))
    config = {"_class_name": "Transformer2DModel", "guidance_embeds": False, "in_channels": WIDTH, "patch_size": 1,
              "sample_size": GRID} | TRANSFORMER
    scheduler = {"_class_name": "Scheduler", "mask_token_id": MASK, "masking_schedule": "cosine"} | SAMPLING
    sampler = Sampler(guidance=SAMPLING["guidance_scale"], temperature=SAMPLING["temperature"],
                      remask=SAMPLING["remask_share"])
    generator = Generator(
        model["transformer"], load_vqmodel(vq), model["text"], words, config, scheduler, (GRID, GRID),
        (compose.SIDE,) * 2, MASK, CODES, SAMPLING["num_inference_steps"], sampler, negative="",
        micro_conds=(compose.SIDE, compose.SIDE, 0.0, 0.0, 6.0),
    )
    fresh = base / "generator"
    save_generator(generator, fresh, dtype=torch.float16)
    out.mkdir(parents=True, exist_ok=True)
    for folder in fresh.iterdir():  # beside the reward and the judge, which stay
        shutil.rmtree(out / folder.name, ignore_errors=True)
        shutil.move(folder, out / folder.name)
