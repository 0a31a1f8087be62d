"""Quality rewards: loading by name, the checks at the start, and what every score must keep."""

import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_tokenizer
from safetensors.torch import save_file

import speedrl.reward
from speedrl.platform import import_torchvision
from speedrl.reward import clip_encoders, load_quality

EMBEDDED = Path(speedrl.reward.__file__).parent / "models" / "embedded" / "reward"
shipped = pytest.mark.skipif(
    not (EMBEDDED / "open_clip_model.safetensors").exists(), reason="the embedded reward has not been built"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random CLIP in open_clip's local layout: 16 pixels, 8 words."""
    import_torchvision()
    from open_clip.model import CLIP

    path = tmp_path_factory.mktemp("rewards") / "tiny"
    write_tokenizer(path)
    model = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {
            "context_length": 8, "vocab_size": 55, "width": 16, "heads": 2, "layers": 1, "hf_tokenizer_name": ".",
        },
    }  # fmt: skip
    about = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (path / "open_clip_config.json").write_text(json.dumps(about))
    torch.manual_seed(0)
    save_file(CLIP(**model).half().state_dict(), path / "open_clip_model.safetensors")
    return path


def pictures(count: int, *, side: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def check_score(score) -> None:
    """What every CLIP score keeps: range, repetition, independence of the batch, the prompt's say, no gradient."""
    images, prompts = pictures(5).requires_grad_(), ["a cat", "a red apple", "a cat on a blue background", "", "a dog"]
    found = score(images, prompts)
    assert found.shape == (5,) and found.dtype == torch.float32 and not found.requires_grad
    assert not found.is_inference(), "a loss multiplied by it could not be differentiated"
    assert found.isfinite().all() and found.abs().max() <= 1 + 1e-5
    assert torch.equal(score(images, prompts), found)
    one_by_one = torch.cat([score(image[None], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
    torch.testing.assert_close(one_by_one, found, atol=1e-5, rtol=0)
    turned = score(images.flip(0), prompts[::-1]).flip(0)
    torch.testing.assert_close(turned, found, atol=1e-5, rtol=0)
    same = score(images[:1].expand(2, -1, -1, -1), ["a cat", "a volcano"])
    assert (same[0] - same[1]).abs() > 1e-4


def test_a_folder_in_open_clips_layout_scores_by_the_cosine(folder):
    score = load_quality(str(folder))
    check_score(score)
    images, texts = clip_encoders(f"local-dir:{folder}")
    one, two = images(pictures(3)), texts(["a cat", "a dog", "a cat"])
    torch.testing.assert_close(one.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(two.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(score(pictures(3), ["a cat", "a dog", "a cat"]), (one * two).sum(-1))


def test_features_are_open_clips_own(folder):
    import_torchvision()
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    images, texts = clip_encoders(f"local-dir:{folder}")
    with torch.no_grad():
        wanted = model.encode_text(tokenizer(["a cat", "an ant"]), normalize=True)
        torch.testing.assert_close(texts(["a cat", "an ant"]), wanted)
        exact = pictures(2, side=16)
        torch.testing.assert_close(images(exact), model.encode_image(exact * 2 - 1, normalize=True))


def test_larger_and_wider_pictures_are_resized_to_the_tower(folder):
    images, _ = clip_encoders(f"local-dir:{folder}")
    small = pictures(2, side=16)
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert (images(small) * images(large)).sum(-1).min() > 0.9
    wide = torch.cat([torch.zeros(2, 3, 16, 5), small, torch.zeros(2, 3, 16, 5)], 3)
    torch.testing.assert_close(images(wide), images(small))


@pytest.mark.parametrize("name", ["", "nonsense", "clip", "clip:", ":", "module:", "/no/such/folder"])
def test_unknown_names_list_what_there_is(name):
    with pytest.raises(ValueError, match="embedded, a folder with open_clip_config.json, clip:ARCHITECTURE") as error:
        load_quality(name)
    assert "\n" not in str(error.value)


def test_broken_folders_are_one_clear_line(folder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    with pytest.raises(ValueError, match="there is no reward"):
        load_quality(str(broken))
    for name in ("tokenizer_config.json", "vocab.json", "merges.txt", "open_clip_config.json"):
        (broken / name).write_bytes((folder / name).read_bytes())
    weights = broken / "open_clip_model.safetensors"
    whole = (folder / weights.name).read_bytes()
    for content in (None, whole[: len(whole) // 2], b"a text file"):
        if content is not None:
            weights.write_bytes(content)
        with pytest.raises(ValueError, match="reward .*broken: cannot be loaded") as error:
            load_quality(str(broken))
        assert "\n" not in str(error.value)
    (broken / "open_clip_config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_quality(str(broken))


def test_weights_belong_to_architectures(folder, tmp_path):
    with pytest.raises(ValueError, match="weights are for clip:ARCHITECTURE only"):
        load_quality(str(folder), weights="openai")
    with pytest.raises(ValueError, match="give weights"):
        load_quality("clip:ViT-B-32")
    with pytest.raises(ValueError, match="clip:no-such: cannot be loaded") as error:
        load_quality("clip:no-such", weights=str(tmp_path / "none.pt"))
    assert "\n" not in str(error.value)


USERS = """
import torch

def brightness(images, prompts):
    return images.mean((1, 2, 3)) + torch.tensor([len(prompt) for prompt in prompts])

def shape(images, prompts):
    return images.mean((2, 3))

def number(images, prompts):
    return 1.0

def integers(images, prompts):
    return torch.ones(len(images), dtype=torch.int64)

def nan(images, prompts):
    return torch.full((len(images),), torch.nan)

def raises(images, prompts):
    raise KeyError("no such key\\nsecond line")

value = 3
"""


@pytest.fixture
def users(tmp_path, monkeypatch):
    (tmp_path / "users_reward.py").write_text(USERS)
    (tmp_path / "users_broken_reward.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))


def test_a_users_function_is_imported_from_the_working_directory(users):
    score = load_quality("users_reward:brightness")
    images = pictures(2).requires_grad_()
    found = score(images, ["a", "abc"])
    assert torch.equal(found, images.detach().mean((1, 2, 3)) + torch.tensor([1, 3])) and not found.requires_grad


@pytest.mark.parametrize(
    "name, message",
    [
        ("users_reward:shape", r"must give a float32 tensor \[2\] for two pictures, gave torch.float32 \[2, 3\]"),
        ("users_reward:number", r"must give a float32 tensor \[2\] for two pictures, gave float"),
        ("users_reward:integers", r"gave torch.int64 \[2\]"),
        ("users_reward:nan", "not finite"),
        ("users_reward:raises", "fails on two pictures"),
        ("users_reward:value", "is no function"),
        ("users_reward:missing", "has no attribute 'missing'"),
        ("users_broken_reward:score", "No module named 'nothing_of_this_name'"),
        ("users_absent_reward:score", "No module named 'users_absent_reward'"),
    ],
)
def test_a_users_function_that_does_not_work_is_one_clear_line(users, name, message):
    with pytest.raises(ValueError, match=message) as error:
        load_quality(name)
    assert str(error.value).startswith(f"reward {name}: ") and "\n" not in str(error.value)


@shipped
def test_the_embedded_reward_loads_offline_and_keeps_what_scores_keep(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the embedded reward asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    check_score(load_quality())


@shipped
def test_the_embedded_reward_is_small_and_of_its_own():
    files = [path for path in EMBEDDED.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert {"open_clip_config.json", "open_clip_model.safetensors", "tokenizer_config.json"} <= {p.name for p in files}


@shipped
def test_the_embedded_reward_reads_the_background():
    score = load_quality("embedded")
    colours = {"red": (214, 52, 56), "green": (72, 168, 88), "blue": (58, 118, 216), "yellow": (250, 212, 70)}
    grounds = torch.stack([torch.tensor(rgb)[:, None, None].expand(3, 64, 64) for rgb in colours.values()]) / 255
    prompts = [f"a cat on a {colour} background" for colour in colours]
    scores = torch.stack([score(grounds, [prompt] * 4) for prompt in prompts])
    assert scores.argmax(1).tolist() == [0, 1, 2, 3]
