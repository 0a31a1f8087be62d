"""Our scores against the packages' public functions, with the same random weights.

Skipped where the packages are not installed: `just parity` makes an environment for them, and asks for HPSv2 at its
real size too, which takes 16 GB of memory.
"""

import importlib.util
import os

import numpy as np
import pytest
import torch

from speedrl.rewards.scorers import hpsv2_score, imagereward_score
from tests import reference
from tests.reference import hpsv2_weights, imagereward_weights, pictures, tensors

PROMPTS = ["a red cat on a mat", "a dog"]
need = {name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"the package {name} is not installed")
        for name in ("ImageReward", "hpsv2")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


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
