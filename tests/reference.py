"""The packages image-reward and hpsv2 as references, with what they need to run beside newer libraries.

For the parity test and its measurement alone. They come with `pip install ".[reference]"`, in an environment of their
own: see pyproject.toml.
"""

import importlib.util
import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from speedrl.rewards.scorers import TEXT, VISION, ImageRewardModel
from speedrl.system.platform import import_torchvision
from tests.test_reward_quality import to_image_reward

WORDS = 30522  # of BERT's vocabulary
CLIP = "ViT-L-14"


def write_vocabulary(path: Path) -> None:
    """A vocabulary of BERT's size: its marks, letters, and words that nothing says."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    path.write_text("\n".join([*known, *(f"[unused{i}]" for i in range(WORDS - len(known)))]) + "\n", encoding="utf-8")


def image_reward(vocabulary: Path):
    """The package ImageReward, importable under transformers 5, with BERT's words from a file."""
    import_torchvision()
    import transformers
    from transformers import modeling_utils, pytorch_utils

    sys.modules.setdefault("clip", types.ModuleType("clip"))  # undeclared; used by another of its scores
    sys.modules.setdefault("ImageReward.ReFL", types.ModuleType("ImageReward.ReFL"))  # its training
    for name in ("apply_chunking_to_forward", "prune_linear_layer"):  # where they were in transformers 4
        setattr(modeling_utils, name, getattr(pytorch_utils, name))
    modeling_utils.find_pruneable_heads_and_indices = None  # nothing is pruned
    package = importlib.import_module("ImageReward")
    pretrain = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
    pretrain.init_tokenizer = lambda: transformers.BertTokenizer(vocab=str(vocabulary), do_lower_case=True)
    bert = importlib.import_module("ImageReward.models.BLIP.med").BertModel
    bert.all_tied_weights_keys = {}
    bert.get_head_mask = lambda self, mask, layers, *_: [None] * layers
    bert.invert_attention_mask = lambda self, mask: (
        (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float).min
    )
    return package


def hpsv2():
    """The module hpsv2.img_score, whose wheel lacks a file that open_clip has and wants a window toolkit."""
    import_torchvision()
    import open_clip

    sys.modules.setdefault("turtle", types.ModuleType("turtle"))
    sys.modules["turtle"].forward = None
    folder = Path(importlib.util.find_spec("hpsv2").origin).parent / "src/open_clip"
    words = "bpe_simple_vocab_16e6.txt.gz"
    if not (folder / words).exists():
        shutil.copy(Path(open_clip.__file__).parent / words, folder / words)
    return importlib.import_module("hpsv2.img_score")


def open_clip_score(path: Path, prompt: str) -> Callable[[list[Image.Image]], torch.Tensor]:
    """The cosine of PIL pictures and a prompt as open_clip's documentation computes it, with weights of a file."""
    import_torchvision()
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(CLIP, pretrained=str(path))
    model, tokenizer = model.eval(), open_clip.get_tokenizer(CLIP)

    def score(images: list[Image.Image]) -> torch.Tensor:
        of_images = model.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
        return (of_images @ model.encode_text(tokenizer([prompt]), normalize=True).T)[:, 0]

    return score


def clip_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Random weights of CLIP."""
    import_torchvision()
    import open_clip

    torch.manual_seed(0)
    return open_clip.create_model(CLIP).state_dict()


def pictures(width: int, height: int) -> list[Image.Image]:
    """Smooth pictures with some noise, as photographs have."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.stack([np.sin(7 * x * (i + 1) + c) + np.cos(9 * y - i * c) for c in range(3)], -1) for i in range(2)]
    return [Image.fromarray(np.uint8(np.clip(127 + 50 * w + 8 * rng.standard_normal(w.shape), 0, 255))) for w in waves]


def tensors(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])


def imagereward_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Random weights with the keys of ImageReward.pt; its vocabulary and configuration are written to the folder."""
    write_vocabulary(folder / "vocab.txt")
    bert = {
        "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.0, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
        "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
        "num_hidden_layers": 12, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": 30524, "encoder_width": 1024,
        "add_cross_attention": True,
    }
    (folder / "med_config.json").write_text(json.dumps(bert), encoding="utf-8")
    torch.manual_seed(0)
    model = ImageRewardModel(vision=VISION, text=TEXT)
    torch.nn.init.normal_(model.head[0].weight, std=0.02)
    return to_image_reward({key: v for key, v in model.state_dict().items() if not key.endswith("position_ids")})


def hpsv2_weights(folder: Path, *, architecture: str = "ViT-H-14") -> dict[str, dict[str, torch.Tensor]]:
    """Random weights with the keys of HPS_v2.1_compressed.pt."""
    hpsv2()
    from hpsv2.src.open_clip import create_model_and_transforms

    torch.manual_seed(0)
    model, *_ = create_model_and_transforms(architecture, None, precision="fp32", light_augmentation=True)
    return {"state_dict": model.state_dict()}
