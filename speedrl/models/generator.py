"""A text-to-image generator: its parts, its prompts as the transformer takes them, and images of its tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from speedrl.method.sampler import Sampler

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection


class Transformer(nn.Module):
    """What a generator's transformer must have. A class and not a Protocol, as all else is taken from `nn.Module`.

    A subclass sets `codes` and `vocabulary`, and has `features` and `head`.
    """

    codes: int  # logits are over tokens 0 .. codes - 1
    vocabulary: int  # tokens 0 .. vocabulary - 1 are read: the codes, the mask and any others
    gradient_checkpointing: bool = False  # whether the blocks are computed again in the backward pass; may be ignored

    def features(self, tokens: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor, micro_conds: Tensor) -> Tensor:
        """What the head reads: tokens int64 [B, H, W], timestep [B] (the steps that are left), and `Prompts` of B
        -> [B, H * W, width]."""
        raise NotImplementedError(f"{type(self).__name__} has no features")

    def head(self, features: Tensor) -> Tensor:
        """features [..., width] -> logits [..., codes]. Pointwise: gather the positions that are needed first."""
        raise NotImplementedError(f"{type(self).__name__} has no head")

    def forward(self, tokens: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor, micro_conds: Tensor) -> Tensor:
        """As `features`, then the head at every position: logits [B, H * W, codes]."""
        return self.head(self.features(tokens, timestep, text, pooled, micro_conds))

    def compile_blocks(self, *, backend: str = "inductor") -> None:
        """Compiles what is worth it, in place; here nothing."""

    @classmethod
    def of_config(cls, config: dict) -> Self:
        """The transformer that a config.json describes: its keys are the keyword arguments, but for those that start
        with _ and are notes."""
        return cls(**{key: value for key, value in config.items() if not key.startswith("_")})

    @classmethod
    def defaults(cls, config: dict) -> dict[str, Any]:
        """What a published model's files may leave out: keys of its scheduler_config.json, and `sample_size` of
        config.json, the side of its grid in tokens."""
        return {}


class Generator(NamedTuple):
    """A text-to-image generator, and how it wants to be sampled."""

    transformer: Transformer
    vqvae: Any  # diffusers.VQModel, float32 and frozen
    text_encoder: "CLIPTextModelWithProjection"  # frozen
    tokenizer: Any  # transformers.CLIPTokenizer
    config: dict  # transformer/config.json
    scheduler: dict  # scheduler/scheduler_config.json
    grid: tuple[int, int]  # rows and columns of tokens
    size: tuple[int, int]  # height and width in pixels
    mask_id: int
    codes: int  # logits are over tokens 0 .. codes - 1
    steps: int  # its usual number of steps
    sampler: Sampler
    negative: str  # the prompt that guidance leads away from, "" for the empty one
    micro_conds: tuple[float, ...]  # width, height, top and left of the crop, aesthetic score
    model_index: dict | None = None  # model_index.json, by which a diffusers pipeline loads the folder
    step_policy: dict[str, Tensor] = {}  # a learned distribution over step counts, opaque here


class Prompts(NamedTuple):
    """What the transformer knows of B prompts."""

    text: Tensor  # [B, T, D], CLIP's hidden_states[-2]
    pooled: Tensor  # [B, D], CLIP's text_embeds
    micro_conds: Tensor  # float32 [B, 5], as Generator's


def check_text(prompts: Sequence[str]) -> None:
    """ValueError for a prompt with surrogates, which an argument's stray bytes become."""
    if any("\ud800" <= letter <= "\udfff" for letter in "".join(prompts)):
        raise ValueError("a prompt is not valid UTF-8: start Python with PYTHONUTF8=1, or give the prompts in a file")


def encode_prompts(generator: Generator, prompts: list[str], *, batch: int = 256) -> Prompts:
    """Text conditioning of B prompts, "" for the empty one of guidance; equal prompts are encoded once.

    On the generator's device, without gradient; text and pooled in the text encoder's dtype. ValueError for none.
    """
    if not prompts:
        raise ValueError("there is no prompt: give at least one")
    check_text(prompts)
    different = list(dict.fromkeys(prompts))
    encoder = generator.text_encoder
    device = encoder.text_projection.weight.device
    length = token_limit(generator)
    ids = generator.tokenizer(
        different, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        parts = [encoder(part.to(device), output_hidden_states=True) for part in ids.split(batch)]
    encoded = Prompts(
        torch.cat([part.hidden_states[-2] for part in parts]),
        torch.cat([part.text_embeds for part in parts]),
        torch.tensor([generator.micro_conds], dtype=torch.float32, device=device).repeat(len(different), 1),
    )
    place = {prompt: i for i, prompt in enumerate(different)}
    return index_prompts(encoded, torch.tensor([place[prompt] for prompt in prompts], device=device))


def token_limit(generator: Generator) -> int:
    """How many tokens of a prompt the text encoder reads."""
    return min(generator.tokenizer.model_max_length, generator.text_encoder.config.max_position_embeddings)


def cut_prompts(generator: Generator, prompts: Sequence[str], *, batch: int = 1024) -> int:
    """How many prompts are longer than the text encoder reads: their ends have no effect."""
    check_text(prompts)
    limit, found = token_limit(generator), 0
    for start in range(0, len(prompts), batch):
        ids = generator.tokenizer(list(prompts[start : start + batch]), verbose=False).input_ids
        found += sum(len(each) > limit for each in ids)
    return found


def index_prompts(prompts: Prompts, index: Tensor | slice) -> Prompts:
    """Prompts at `index`, int64 [N] or a slice, in that order and as often as they stand there."""
    return Prompts(*(part[index] for part in prompts))


def repeat_prompts(prompts: Prompts, times: int) -> Prompts:
    """Every prompt `times` times, the copies of one beside each other: [B, ...] -> [B * times, ...]."""
    return Prompts(*(part.repeat_interleave(times, 0) for part in prompts))


def cat_prompts(*prompts: Prompts) -> Prompts:
    """Several batches of prompts as one."""
    return Prompts(*(torch.cat(parts) for parts in zip(*prompts, strict=True)))


def fitting_batch(generator: Generator) -> int:
    """How many images at a time: 64 of 256 tokens, and of larger ones fewer, as memory grows with their tokens."""
    return max(1, 64 * 256 // (generator.grid[0] * generator.grid[1]))


@torch.no_grad()
def decode(generator: Generator, tokens: Tensor, *, batch: int | None = None, bf16: bool | None = None) -> Tensor:
    """Images of finished tokens int64 [B, L]: float32 [B, 3, H, W] in [0, 1], `batch` of them at a time.

    The decoders of Meissonic and aMUSEd give [0, 1] themselves: nothing is rescaled. `batch` None is `fitting_batch`.
    `bf16` computes convolutions in bfloat16, by default where the transformer's weights are in it: about one part in
    255 from float32.
    """
    rows, columns = generator.grid
    bf16 = next(generator.transformer.parameters()).dtype == torch.bfloat16 if bf16 is None else bf16
    batch = fitting_batch(generator) if batch is None else batch
    pictures = []
    for part in tokens.split(batch):
        shape = (len(part), rows, columns, generator.vqvae.config.latent_channels)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
            picture = generator.vqvae.decode(part, force_not_quantize=True, shape=shape, return_dict=False)[0]
        pictures.append(picture.float().clamp(0, 1).contiguous())
    return torch.cat(pictures)
