"""Published models that score pictures against prompts: CLIP, HPSv2.1 and ImageReward. They know nothing of RL.

Each loader gives score(images float [B, 3, H, W] in [0, 1], B prompts) -> float32 [B] on its device, without gradient.
Pictures stay tensors: their preprocessing is that of the model's own package on tensors. Weights are read with
`weights_only=True`. Loaders raise FileNotFoundError where weights are neither given, nor cached, nor to be fetched,
and ValueError where a file is no such model's; both in one line.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedrl.models.loading import NoInitialisation, count_positions, fill
from speedrl.system.errors import one_line
from speedrl.system.hub import hub_file
from speedrl.system.platform import bf16_autocast, import_torchvision

Score = Callable[[Tensor, list[str]], Tensor]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's CLIP, all three
IMAGE_REWARD_MEAN, IMAGE_REWARD_STD = 0.16717362830052426, 1.0333394966054072  # what its package subtracts, divides by
IMAGE_REWARD_WORDS = 35
INSTEAD = "give it by `reward_weights`"
REMEMBERED = 16_384  # prompts whose features are kept


def resized(pictures: Tensor, height: int, width: int) -> Tensor:
    """Bicubic and antialiased, as PIL resizes but without its rounding; nothing where the size is right."""
    if pictures.shape[2:] == (height, width):
        return pictures
    return F.interpolate(pictures, size=(height, width), mode="bicubic", antialias=True)


def cropped(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """The shorter side to size, then the middle of the longer one: [B, 3, H, W] -> [B, 3, *size] in [0, 1]."""
    high, wide = pictures.shape[2:]
    scale = max(size[0] / high, size[1] / wide)
    # the shorter side exactly, the longer one rounded down, as torchvision's Resize
    height, width = (max(int(side * scale + 1e-6), least) for side, least in zip((high, wide), size, strict=True))
    pictures = resized(pictures, height, width).clamp(0, 1)
    top, left = (int(round((full - part) / 2)) for full, part in zip((height, width), size, strict=True))
    return pictures[:, :, top : top + size[0], left : left + size[1]]


def padded(pictures: Tensor, side: int) -> Tensor:
    """The longer side to `side`, black around it: HPSv2's own, which does not clamp. -> [B, 3, side, side]"""
    scale = side / max(pictures.shape[2:])
    height, width = (round(length * scale) for length in pictures.shape[2:])
    down, across = side - height, side - width
    around = (across // 2, across - across // 2, down // 2, down - down // 2)
    return F.pad(resized(pictures, height, width), around)


def normalised(pictures: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    shift, scale = (pictures.new_tensor(values)[:, None, None] for values in (mean, std))
    return (pictures - shift) / scale


def in_parts(score: Score, size: int) -> Score:
    """The same score, `size` pictures at a time, so that memory does not grow with the batch."""

    def scored(pictures: Tensor, prompts: list[str]) -> Tensor:
        starts = range(0, len(pictures), size)
        return torch.cat([score(pictures[i : i + size], prompts[i : i + size]) for i in starts])

    return scored


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a .pt or .safetensors file; the part "state_dict" of it where there is one."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give another by `reward_weights`")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        return found.get("state_dict", found)
    except Exception as error:  # torch and safetensors have many errors for a damaged file
        raise ValueError(f"{path} cannot be read as weights: {one_line(error)}") from error


def sequence_first(model: Any) -> Any:
    """Has an open_clip model's transformers work on [words, pictures, width], which gives the same features.

    PyTorch's attention transposes to that anyway, and its product with a transposed input is a batched one that copies
    the weights for every word: on a CPU, in bf16, 80 times as slow as the same product on a contiguous input.
    """
    from open_clip.transformer import Transformer

    for transformer in (module for module in model.modules() if type(module) is Transformer):
        attentions = [getattr(block, "attn", None) for block in transformer.resblocks]
        if all(type(attention) is nn.MultiheadAttention for attention in attentions):
            for module in (transformer, *attentions):
                module.batch_first = False
    return model


def clip_features(
    model: Any, tokenizer: Callable, preprocess: Callable[[Tensor], Tensor], *,
    device: torch.device | str, bf16: bool | None = None, micro_batch: int = 64,
) -> tuple[Callable[[Tensor], Tensor], Callable[[list[str]], Tensor]]:
    """An open_clip model as two functions: of float [B, 3, H, W] in [0, 1], on any device, and of B prompts.

    Both return float32 [B, D] of norm 1 on `device`, of pictures with a gradient where they have one; the latest
    prompts are remembered. The model is made `sequence_first`.
    """
    sequence_first(model)

    def images(pictures: Tensor) -> Tensor:
        found = []
        for part in pictures.split(micro_batch):
            with bf16_autocast(device, enabled=bf16):
                features = model.encode_image(preprocess(part.to(device).float()))
            found.append(F.normalize(features.float(), dim=-1))
        return torch.cat(found)

    @functools.lru_cache(maxsize=REMEMBERED)
    @torch.no_grad()
    def prompt(text: str) -> Tensor:  # one at a time, so that no other prompt of a batch changes its last digits
        with bf16_autocast(device, enabled=bf16):
            features = model.encode_text(tokenizer([text]).to(device))
        return F.normalize(features[0].float(), dim=-1)

    return images, lambda prompts: torch.stack([prompt(text) for text in prompts])


def clip_encoders(
    name: str, *, device: torch.device | str = "cpu", weights: str | None = None, published: str | None = None,
    bf16: bool | None = None,
) -> tuple[Callable[[Tensor], Tensor], Callable[[list[str]], Tensor]]:
    """`clip_features` of open_clip's model `name`: "local-dir:FOLDER", or an architecture with `weights`, which are a
    file or the name of published ones; `published` is the name of those that a file holds. Weights that were trained
    with QuickGELU get it, which open_clip only warns of. Raises what open_clip raises, RuntimeError where no weights
    are found."""
    import_torchvision()
    import open_clip

    asked = open_clip.get_pretrained_cfg(name.replace("/", "-"), published or weights or "")
    model = open_clip.create_model(
        name, pretrained=weights or published, device=device, require_pretrained=True,
        force_quick_gelu=asked.get("quick_gelu", False),
    )
    about = model.visual.preprocess_cfg | {key: asked[key] for key in ("mean", "std") if key in asked}
    size = (about["size"],) * 2 if isinstance(about["size"], int) else tuple(about["size"])

    def preprocess(pictures: Tensor) -> Tensor:
        return normalised(cropped(pictures, size), tuple(about["mean"]), tuple(about["std"]))

    return clip_features(
        model.eval().requires_grad_(False), open_clip.get_tokenizer(name), preprocess, device=device, bf16=bf16
    )


def clip_score(
    name: str, *, device: torch.device | str = "cpu", weights: str | None = None, published: str | None = None,
    bf16: bool | None = None,
) -> Score:
    """The cosine of a picture's and its prompt's features, from -1 to 1, of an open_clip model: see `clip_encoders`."""
    images, texts = clip_encoders(name, device=device, weights=weights, published=published, bf16=bf16)
    return lambda pictures, prompts: (images(pictures) * texts(prompts)).sum(-1)


def hpsv2_score(
    *, device: torch.device | str = "cpu", weights: str | None = None, bf16: bool | None = None,
    architecture: str = "ViT-H-14", micro_batch: int = 16,
) -> Score:
    """HPSv2.1 (arXiv 2306.09341): open_clip's ViT-H-14 with human preferences' weights; the cosine of the features.

    `weights` is HPS_v2.1_compressed.pt, by default that of the hub's xswu/HPSv2. Preprocessing is that of the package
    hpsv2: the longer side to 224, without clamping, and zeros around it.
    """
    import_torchvision()
    import open_clip

    path = Path(weights) if weights else hub_file("xswu/HPSv2", "HPS_v2.1_compressed.pt", instead=INSTEAD)
    state = read_weights(path)
    with torch.device("meta"), NoInitialisation():
        model = open_clip.create_model(architecture, device="meta")
    words = model.context_length
    model.attn_mask = torch.full((words, words), -torch.inf).triu(1)  # each word sees those before it; no file holds it
    fill(model, state, path).requires_grad_(False).to(device)
    side = model.visual.image_size
    side = side if isinstance(side, int) else side[0]
    images, texts = clip_features(
        model, open_clip.get_tokenizer(architecture), lambda pictures: normalised(padded(pictures, side)),
        device=device, bf16=bf16, micro_batch=micro_batch,
    )
    return lambda pictures, prompts: (images(pictures) * texts(prompts)).sum(-1)


VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224,
              patch_size=16, layer_norm_eps=1e-6)
TEXT = dict(vocab_size=30524, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            encoder_hidden_size=1024, max_position_embeddings=512, is_decoder=True, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0)


class ImageRewardModel(nn.Module):
    """BLIP's picture encoder, its text encoder that looks at the picture, and five linear layers on the first word."""

    def __init__(self, *, vision: dict, text: dict):
        super().__init__()
        import_torchvision()
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        self.text = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        widths = (text["hidden_size"], 1024, 128, 64, 16, 1)
        self.head = nn.ModuleList([nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)])

    def forward(self, pictures: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        seen = self.vision(pixel_values=pictures).last_hidden_state
        everywhere = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        read = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, encoder_attention_mask=everywhere,
            is_decoder=False,
        )
        x = read.last_hidden_state[:, 0].float()
        with torch.autocast(x.device.type, enabled=False):  # the package's head is float32
            for layer in self.head:
                x = layer(x)
        return (x[:, 0] - IMAGE_REWARD_MEAN) / IMAGE_REWARD_STD


def from_image_reward(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """ImageReward.pt's keys as `ImageRewardModel`'s: its BLIP has timm's names, ours transformers'."""
    renamed = {}
    vision = {"patch_embed.proj": "embeddings.patch_embedding", "cls_token": "embeddings.class_embedding",
              "pos_embed": "embeddings.position_embedding", "norm": "post_layernorm"}
    block = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.qkv": "self_attn.qkv",
             "attn.proj": "self_attn.projection"}
    # the head's dropouts have numbers but no weights
    head = {"mlp.layers.0": "0", "mlp.layers.2": "1", "mlp.layers.4": "2", "mlp.layers.6": "3", "mlp.layers.7": "4"}
    for key, value in state.items():
        stem, _, last = key.rpartition(".")
        if stem in head:
            renamed[f"head.{head[stem]}.{last}"] = value
        elif key.startswith("blip.text_encoder.") and not key.endswith("position_ids"):
            renamed["text." + key.removeprefix("blip.text_encoder.")] = value
        elif key.startswith("blip.visual_encoder.blocks."):
            number, _, rest = key.removeprefix("blip.visual_encoder.blocks.").partition(".")
            stem, _, last = rest.rpartition(".")
            renamed[f"vision.encoder.layers.{number}.{block.get(stem, stem)}.{last}"] = value
        elif key.startswith("blip.visual_encoder."):
            rest = key.removeprefix("blip.visual_encoder.")
            stem, _, last = rest.rpartition(".")
            renamed["vision." + (vision[rest] if rest in vision else f"{vision.get(stem, stem)}.{last}")] = value
    return renamed


def imagereward_score(
    *, device: torch.device | str = "cpu", weights: str | None = None, bf16: bool | None = None,
    vision: dict = VISION, text: dict = TEXT, micro_batch: int = 16,
) -> Score:
    """ImageReward (arXiv 2304.05977) by transformers' BLIP, scaled as its package scales it.

    `weights` is ImageReward.pt, by default that of the hub's THUDM/ImageReward. The words are BERT's: vocab.txt beside
    the weights, else the hub's google-bert/bert-base-uncased.
    """
    import_torchvision()
    from transformers import BertTokenizer

    path = Path(weights) if weights else hub_file("THUDM/ImageReward", "ImageReward.pt", instead=INSTEAD)
    state = from_image_reward(read_weights(path))
    vocabulary = path.parent / "vocab.txt"
    if not vocabulary.exists():
        vocabulary = hub_file("google-bert/bert-base-uncased", "vocab.txt", instead="put it beside the weights")
    tokenizer = BertTokenizer(vocab=str(vocabulary), do_lower_case=True)
    with torch.device("meta"), NoInitialisation():
        model = ImageRewardModel(vision=vision, text=text)
    count_positions(model)
    fill(model, state, path).requires_grad_(False).to(device)
    size = (vision["image_size"],) * 2

    @functools.lru_cache(maxsize=REMEMBERED)
    def words(prompt: str) -> tuple[Tensor, Tensor]:
        found = tokenizer(
            prompt, padding="max_length", truncation=True, max_length=IMAGE_REWARD_WORDS, return_tensors="pt"
        )
        return found.input_ids[0].to(device), found.attention_mask[0].to(device)

    def score(pictures: Tensor, prompts: list[str]) -> Tensor:
        ids, mask = (torch.stack(part) for part in zip(*map(words, prompts), strict=True))
        with bf16_autocast(device, enabled=bf16):
            return model(normalised(cropped(pictures.to(device).float(), size)), ids, mask)

    return in_parts(score, micro_batch)
