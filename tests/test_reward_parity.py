"""Our scores against the packages' public functions, with the same random weights.

Skipped where the packages are not installed: `just parity` makes an environment for them, and asks for HPSv2 at its
real size too, which takes 16 GB of memory.
"""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from speedrl.models.scorers import TEXT, VISION, ImageRewardModel, hpsv2_score, imagereward_score
from tests import reference
from tests.test_reward_quality import to_image_reward

PROMPTS = ["a red cat on a mat", "a dog"]
need = {name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"the package {name} is not installed")
        for name in ("ImageReward", "hpsv2")}  # fmt: skip


def pictures(width: int, height: int) -> list[Image.Image]:
    """Smooth pictures with some noise, as photographs have."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.stack([np.sin(7 * x * (i + 1) + c) + np.cos(9 * y - i * c) for c in range(3)], -1) for i in range(2)]
    return [Image.fromarray(np.uint8(np.clip(127 + 50 * w + 8 * rng.standard_normal(w.shape), 0, 255))) for w in waves]


def tensors(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


def imagereward_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Random weights with the keys of ImageReward.pt; its vocabulary and configuration are written to the folder."""
    reference.write_vocabulary(folder / "vocab.txt")
    bert = {
        "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.0, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
        "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
        "num_hidden_layers": 12, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": 30524, "encoder_width": 1024,
        "add_cross_attention": True,
    }  # fmt: skip
    (folder / "med_config.json").write_text(json.dumps(bert))
    torch.manual_seed(0)
    model = ImageRewardModel(vision=VISION, text=TEXT)
    torch.nn.init.normal_(model.head[0].weight, std=0.02)
    return to_image_reward({key: v for key, v in model.state_dict().items() if not key.endswith("position_ids")})


def hpsv2_weights(folder: Path, *, architecture: str = "ViT-H-14") -> dict[str, dict[str, torch.Tensor]]:
    """Random weights with the keys of HPS_v2.1_compressed.pt."""
    reference.hpsv2()
    from hpsv2.src.open_clip import create_model_and_transforms

    torch.manual_seed(0)
    model, *_ = create_model_and_transforms(architecture, None, precision="fp32", light_augmentation=True)
    return {"state_dict": model.state_dict()}


@need["ImageReward"]
def test_imagereward_is_the_packages_own(folder):
    torch.save(imagereward_weights(folder), folder / "ImageReward.pt")
    package = reference.image_reward(folder / "vocab.txt")
    theirs = package.load(str(folder / "ImageReward.pt"), device="cpu", med_config=str(folder / "med_config.json"))
    score = imagereward_score(weights=str(folder / "ImageReward.pt"), bf16=False)
    for size in ((224, 224), (300, 500)):
        images = pictures(*size)
        fitted = [theirs.preprocess.transforms[1](theirs.preprocess.transforms[0](image)) for image in images]
        for prompt in PROMPTS:
            with torch.no_grad():
                wanted = torch.tensor(theirs.score(prompt, images))
            found = score(tensors(fitted), [prompt] * 2)  # through the package's own resizing of PIL pictures
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
            away = (score(tensors(images), [prompt] * 2) - wanted).abs().max().item()
            print(f"ImageReward, {size}: {away:.1e} from resizing tensors in place of PIL pictures")
            assert away < 0.05


real_size = pytest.mark.skipif("SPEEDRL_REAL_SIZE" not in os.environ, reason="16 GB of memory: set SPEEDRL_REAL_SIZE")


@need["hpsv2"]
@pytest.mark.parametrize("architecture", ["ViT-B-16", pytest.param("ViT-H-14", marks=real_size)])
def test_hpsv2_is_the_packages_own(architecture, folder, monkeypatch):
    module = reference.hpsv2()
    from hpsv2.src.open_clip import create_model_and_transforms

    torch.save(hpsv2_weights(folder, architecture=architecture), folder / "hps.pt")
    model, _, preprocess = create_model_and_transforms(
        architecture, None, precision="fp32", light_augmentation=True, output_dict=True
    )
    monkeypatch.setattr(module, "model_dict", {"model": model, "preprocess_val": preprocess})
    score = hpsv2_score(weights=str(folder / "hps.pt"), bf16=False, architecture=architecture)
    for size in ((224, 224), (300, 500)):
        images = pictures(*size)
        for prompt in PROMPTS:
            wanted = torch.tensor(np.array(module.score(images, prompt, cp=str(folder / "hps.pt"))))
            torch.testing.assert_close(score(tensors(images), [prompt] * 2), wanted.float(), atol=1e-6, rtol=0)
