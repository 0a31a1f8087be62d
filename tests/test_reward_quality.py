"""Quality rewards: loading by name, the checks at the start, and what every score must keep."""

import contextlib
import importlib
import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import speedrl.rewards.loading
from experiments.embedded.compose import COLOURS
from speedrl.method.rewards import Moments, disagreeing, mixture, observe
from speedrl.models.generator import decode
from speedrl.rewards.loading import STATES, load_qualities, load_quality, parse_quality, rate
from speedrl.rewards.scorers import (
    MEAN,
    STD,
    TEXT,
    VISION,
    ImageRewardModel,
    clip_encoders,
    hpsv2_score,
    imagereward_score,
    normalised,
    sequence_first,
)
from speedrl.system.platform import import_torchvision
from tests.conftest import write_tokenizer

EMBEDDED = Path(speedrl.rewards.loading.__file__).parents[1] / "models" / "embedded" / "reward"
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
    }
    about = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (path / "open_clip_config.json").write_text(json.dumps(about), encoding="utf-8")
    torch.manual_seed(0)
    save_file(CLIP(**model).half().state_dict(), path / "open_clip_model.safetensors")
    return path


def pictures(count: int, *, side: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def check_score(score) -> None:
    """What every CLIP score keeps: range, repetition, the prompt's say but not the batch's."""
    images, prompts = pictures(5), ["a cat", "a red apple", "a cat on a blue background", "", "a dog"]
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
    images, texts = clip_encoders(f"local-dir:{folder}", bf16=False)
    with torch.no_grad():
        wanted = model.encode_text(tokenizer(["a cat", "an ant"]), normalize=True)
        torch.testing.assert_close(texts(["a cat", "an ant"]), wanted)
        exact = pictures(2, side=16)
        torch.testing.assert_close(images(exact), model.encode_image(exact * 2 - 1, normalize=True))


def test_no_attention_multiplies_a_transposed_input(folder):
    import_torchvision()
    import open_clip

    model, seen = sequence_first(open_clip.create_model(f"local-dir:{folder}").eval()), []
    for module in model.modules():
        if isinstance(module, torch.nn.MultiheadAttention):
            module.register_forward_pre_hook(
                lambda module, given, named: seen.append(
                    not module.batch_first and (*given, *named.values())[0].is_contiguous()
                ),
                with_kwargs=True,
            )
    with torch.no_grad():
        model.encode_image(pictures(2, side=16))
        model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(["a cat", "an ant"]))
    assert seen == [True, True]


def test_larger_and_wider_pictures_are_resized_to_the_tower(folder):
    images, _ = clip_encoders(f"local-dir:{folder}")
    small = pictures(2, side=16)
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert (images(small) * images(large)).sum(-1).min() > 0.9
    wide = torch.cat([torch.zeros(2, 3, 16, 5), small, torch.zeros(2, 3, 16, 5)], 3)
    torch.testing.assert_close(images(wide), images(small))


@pytest.mark.parametrize("name", ["", "nonsense", "clip:", ":", "module:", "/no/such/folder"])
def test_unknown_names_list_what_there_is(name):
    with pytest.raises(ValueError, match="embedded, hpsv2, imagereward, clip, clip:ARCHITECTURE:WEIGHTS") as error:
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
    (broken / "open_clip_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_quality(str(broken))


def test_weights_belong_to_architectures(folder, tmp_path):
    with pytest.raises(ValueError, match="are for hpsv2, imagereward and clip only"):
        load_quality(str(folder), weights="openai")
    with pytest.raises(ValueError, match="say which weights"):
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

def deep(images, prompts):
    return torch.dot(images, images)

def silent(images, prompts):
    assert not prompts

value = 3
"""


@pytest.fixture
def users(tmp_path, monkeypatch):
    (tmp_path / "users_reward.py").write_text(USERS, encoding="utf-8")
    (tmp_path / "users_wrong.py").write_text("\ndef score(:\n", encoding="utf-8")
    (tmp_path / "users_broken_reward.py").write_text("import nothing_of_this_name\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))


def test_a_users_function_is_imported_from_the_working_directory(users):
    score = load_quality("users_reward:brightness")
    images = pictures(2).requires_grad_()
    found = score(images, ["a", "abc"])
    assert torch.equal(found, images.detach().mean((1, 2, 3)) + torch.tensor([1, 3])) and found.requires_grad
    assert not score(images.detach(), ["a", "abc"]).requires_grad


@pytest.mark.parametrize(
    "name, message",
    [
        ("users_reward:shape", r"must give a tensor \[2\] for as many images, gave \[2, 3\]"),
        ("users_reward:number", r"must give a tensor \[2\] for as many images, gave float"),
        ("users_reward:integers", r"must give float32, gave torch.int64; end it with .float\(\)"),
        ("users_reward:nan", "gives nan, not a finite number, for 2 of 2 images"),
        ("users_reward:raises", r"fails on 2 images: KeyError: 'no such key.nsecond line' \(\S+users_reward.py:20\)"),
        ("users_reward:deep", r"RuntimeError: 1D tensors expected.*\(\S+users_reward.py:23\)"),
        ("users_reward:silent", r"fails on 2 images: AssertionError \(\S+users_reward.py:26\)"),
        ("users_reward.py:missing", "has no attribute 'missing'"),
        ("nowhere.py:score", "there is no file nowhere.py"),
        ("users_broken_reward.py:score", r"ModuleNotFoundError: No module .* \(\S*users_broken_reward.py:1\)"),
        ("users_wrong.py:score", "SyntaxError: .* line 2"),
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


TABLE = """
from users_helper import TABLE
import torch

def score(images, prompts):
    assert images.shape[1:] == (3, 32, 16)
    return torch.tensor([TABLE[prompt] for prompt in prompts])
"""


def test_a_reward_is_tried_on_the_runs_own_prompts_and_at_the_models_own_size(users, tmp_path):
    (tmp_path / "users_table.py").write_text(TABLE, encoding="utf-8")
    (tmp_path / "users_helper.py").write_text("TABLE = {'an owl': 1.0, 'a cat': 2.0}\n", encoding="utf-8")
    for prompts in (["an owl"], ["an owl", "a cat", "not in the table"], ("a cat", "an owl")):
        score = load_quality("users_table:score", prompts=prompts, size=(32, 16))
        assert score(torch.rand(2, 3, 32, 16), ["an owl", "a cat"]).tolist() == [1, 2]
        assert load_qualities("users_table:score", prompts=prompts, size=(32, 16))[1] == {"users_table:score": 1}
    with pytest.raises(ValueError, match=r"fails on 2 images: KeyError: 'a dog' \(\S+users_table.py:7\)"):
        load_quality("users_table:score", prompts=["a dog"], size=(32, 16))


def test_a_function_in_a_file_is_a_reward_wherever_the_file_is(users, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/rw.py").write_text(TABLE, encoding="utf-8")
    (tmp_path / "elsewhere/users_helper.py").write_text("TABLE = {'an owl': 3.0}\n", encoding="utf-8")
    sys.modules.pop("users_helper", None)
    how = {"prompts": ["an owl"], "size": (32, 16)}
    for name in ("elsewhere/rw.py:score", str(tmp_path / "elsewhere/rw.py:score")):
        scores, weights = load_qualities(f"{name}=0.5,users_reward.py:brightness", **how)
        assert scores[name](torch.rand(1, 3, 32, 16), ["an owl"]).tolist() == [3]
        assert weights == {name: 0.5, "users_reward.py:brightness": 1}


@pytest.mark.parametrize("name", ["test", "json", "random", "speedrl_never_imported"])
@pytest.mark.parametrize("imported", [False, True])
def test_a_module_of_the_working_directory_is_preferred_to_another_of_its_name(users, tmp_path, name, imported):
    if imported and not name.startswith("speedrl"):
        importlib.import_module(name)
    before = sys.modules.get(name)
    (tmp_path / f"{name}.py").write_text(USERS, encoding="utf-8")
    assert load_quality(f"{name}:brightness")(pictures(1), ["ab"]) > 2
    assert before is None or sys.modules[name] is before
    if before is None:
        del sys.modules[name]


def test_a_function_is_a_reward_and_so_is_a_dictionary(folder):
    def bright(images, prompts):
        return images.mean((1, 2, 3))

    def broken(images, prompts):
        raise KeyError("no such prompt")

    images = pictures(2)
    scores, weights = load_qualities(bright)
    assert weights == {"bright": 1} and torch.equal(scores["bright"](images, ["a", "b"]), bright(images, []))
    scores, weights = load_qualities({"light": bright, "dark": (lambda x, p: -bright(x, p), 0.5), str(folder): 0})
    assert weights == {"light": 1, "dark": 0.5, str(folder): 0} and scores.keys() == weights.keys()
    assert torch.equal(scores["dark"](images, ["a", "b"]), -bright(images, []))
    for bad in ({"a": None}, {"a": (bright, "x")}, {"a": float("nan")}, {"a": True}):
        with pytest.raises(ValueError, match="quality a: give a weight, a function, or"):
            load_qualities(bad)
    with pytest.raises(ValueError, match=r"reward mine: fails on 2 images: KeyError: .*test_reward_quality.py:\d+"):
        load_qualities({"mine": broken})
    with pytest.raises(ValueError, match="every weight is 0"):
        load_qualities({"light": (bright, 0)})


def guidance_by_slope(images, prompts):
    """Changes its images in place and takes a gradient of its own, as a user may."""
    images.mul_(0.5)
    prompts.clear()
    with torch.enable_grad():
        images.requires_grad_()
        (slope,) = torch.autograd.grad((images**2).sum(), images)
    return slope.mean((1, 2, 3))


@torch.inference_mode()
def inferred(images, prompts):
    return images.mean((1, 2, 3))


def test_a_reward_may_change_its_images_and_use_autograd_wherever_it_is_called(tiny_generator):
    score, other = load_quality(guidance_by_slope), load_quality(inferred)
    images = decode(tiny_generator, torch.arange(32).view(2, 16))
    with torch.inference_mode():
        inside = decode(tiny_generator, torch.arange(32).view(2, 16))
    for given in (images, inside):
        before, prompts = given.clone(), ["a", "b"]
        for mode in (contextlib.nullcontext(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
            with mode:
                found = [each(given, prompts) for each in (score, other)]
            assert not any(value.is_inference() or value.requires_grad for value in found)
            assert torch.equal(*found) and torch.equal(given, before) and prompts == ["a", "b"]
            assert not given.requires_grad


def test_a_reward_that_gives_the_same_tensor_each_time_is_not_changed_afterwards():
    kept = torch.zeros(2)
    score = load_quality(lambda images, prompts: kept.copy_(images.mean((1, 2, 3))))
    first = score(torch.zeros(2, 3, 4, 4), ["a", "b"])
    score(torch.ones(2, 3, 4, 4), ["a", "b"])
    assert first.tolist() == [0, 0]


RUDE = """
import os, torch
torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)
torch.set_num_threads(torch.get_num_threads() + 1)
torch.set_float32_matmul_precision("medium")
os.chdir("/")

def score(images, prompts):
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True)
    return images.mean((1, 2, 3))
"""


def test_what_a_reward_changes_of_the_process_is_set_back_with_a_warning(users, tmp_path):
    (tmp_path / "rude.py").write_text(RUDE, encoding="utf-8")
    before = {what: read() for what, (read, _) in STATES.items()}
    with pytest.warns(UserWarning, match=r"reward rude.py:score: its code changed .* is set back") as said:
        score = load_quality("rude.py:score")
        score(pictures(2), ["a", "b"])
    assert {what: read() for what, (read, _) in STATES.items()} == before
    told = [str(warning.message) for warning in said]
    assert len(told) == len(STATES) and all(any(what in line for line in told) for what in STATES)
    assert "changed torch's default dtype from torch.float32 to torch.float64, which is set back" in told[1]


def test_no_reward_at_all_can_be_asked_for():
    assert load_qualities("none") == ({}, {}) and parse_quality(" none ") == {}
    with pytest.raises(ValueError, match="stands alone"):
        load_qualities("none,embedded")


def test_a_reward_that_is_not_finite_says_nothing_of_checkpoints():
    with pytest.raises(ValueError, match="gives nan, not a finite number, for 1 of 2 images, .* prompt 'an owl'$"):
        rate("mine", lambda images, prompts: torch.tensor([0.0, torch.nan]), pictures(2), ["a cat", "an owl"])


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
    grounds = torch.stack([torch.tensor(rgb)[:, None, None].expand(3, 64, 64) for rgb in COLOURS.values()]) / 255
    prompts = [f"a cat on a {colour} background" for colour in COLOURS]
    scores = torch.stack([score(grounds, [prompt] * len(COLOURS)) for prompt in prompts])
    assert scores.argmax(1).tolist() == [*range(len(COLOURS))]


def test_names_and_weights_are_read():
    assert parse_quality("embedded") == {"embedded": 1.0}
    assert parse_quality("hpsv2=1, imagereward=0.5,clip:ViT-B-32:openai=-2") == {
        "hpsv2": 1.0, "imagereward": 0.5, "clip:ViT-B-32:openai": -2.0,
    }
    for bad in ("", "a=b", "=1", "a,a", "a=nan", "a=0", "a=1,", "a==1"):
        with pytest.raises(ValueError, match="quality"):
            parse_quality(bad)
    with pytest.raises(ValueError, match="NAME=PATH with a name out of hpsv2"):
        load_qualities("hpsv2", weights=["clip=x.pt"])
    with pytest.raises(ValueError, match="reward hpsv2: cannot be loaded: there is no file nowhere.pt"):
        load_qualities("hpsv2", weights=["hpsv2=nowhere.pt"])


def test_running_moments_are_those_of_all_values_together():
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 3 + 100
    moments = Moments()
    for row in values:
        moments = observe(moments, row)
    assert moments.count == 35
    assert moments.mean == pytest.approx(values.mean().item())
    assert moments.squares / 35 == pytest.approx(values.var(correction=0).item(), rel=1e-5)


def test_a_mixture_weighs_the_same_whatever_the_units():
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(64, generator=generator), torch.randn(64, generator=generator)
    weights = {"one": 1.0, "two": 0.5, "watched": 0.0}

    def mixed(scale: float, shift: float) -> torch.Tensor:
        parts = {"one": one, "two": two * scale + shift, "watched": one * 1e6}
        return mixture(parts, weights, {name: observe(Moments(), part) for name, part in parts.items()})

    torch.testing.assert_close(mixed(1.0, 0.0), mixed(1000.0, -7.0), atol=1e-4, rtol=1e-4)
    single = {"one": one}
    moments = {"one": observe(Moments(), one)}
    assert torch.equal(mixture(single, {"one": 2.0}, moments), 2 * one), "one quality keeps its units"


def test_clipping_bounds_what_one_quality_can_win():
    parts = {"a": torch.tensor([0.0] * 99 + [1000.0])}
    moments = {"a": observe(Moments(), torch.randn(1000, generator=torch.Generator().manual_seed(0)))}
    free, held = (mixture(parts, {"a": 1.0}, moments, clip=clip) for clip in (None, 2.0))
    assert free.max() == 1000 and held.max() < 2.2 and torch.equal(held[:99], free[:99])


def test_a_reward_that_rises_while_another_falls_is_named():
    noise = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)) * 0.1
    rising, falling, flat = noise[0] + torch.arange(20) * 0.1, noise[1] - torch.arange(20) * 0.1, noise[2]
    history = [{"a": a, "b": b, "c": c} for a, b, c in zip(*(x.tolist() for x in (rising, falling, flat)), strict=True)]
    assert disagreeing(history, {"a": 1.0, "b": 0.0, "c": 0.0}) == ["b"]
    assert disagreeing(history, {"a": 0.0, "b": 1.0, "c": 1.0}) == [], "nothing that is rewarded rises"
    assert disagreeing(history[:3], {"a": 1.0, "b": 0.0}) == [], "too short to say"


def tiny_hpsv2(path: Path) -> tuple[str, object]:
    """A tiny ViT of open_clip under a name of its own, and its weights in the layout of HPS_v2.1_compressed.pt."""
    import_torchvision()
    import open_clip

    about = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 224, "layers": 1, "width": 16, "head_width": 8, "patch_size": 56},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (path / "tiny-hps.json").write_text(json.dumps(about), encoding="utf-8")
    open_clip.add_model_config(path / "tiny-hps.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-hps").eval()
    state = {key: value for key, value in model.state_dict().items() if key != "attn_mask"}
    torch.save({"state_dict": state}, path / "hps.pt")
    return "tiny-hps", model


def test_hpsv2_is_the_cosine_after_the_longer_side_is_fitted(tmp_path):
    name, model = tiny_hpsv2(tmp_path)
    import open_clip
    from torchvision.transforms.functional import InterpolationMode, normalize, pad, resize

    score = hpsv2_score(weights=str(tmp_path / "hps.pt"), architecture=name, bf16=False)
    for shape in ((224, 224), (300, 500), (97, 64)):
        images, prompts = torch.rand(3, 3, *shape, generator=torch.Generator().manual_seed(1)), ["a cat", "", "a dog"]
        scale = 224 / max(shape)
        size = [round(side * scale) for side in shape]
        down, across = 224 - size[0], 224 - size[1]
        fitted = resize(images, size, InterpolationMode.BICUBIC, antialias=True)
        fitted = pad(fitted, [across // 2, down // 2, across - across // 2, down - down // 2])
        with torch.no_grad():
            seen = model.encode_image(normalize(fitted, MEAN, STD), normalize=True)
            said = model.encode_text(open_clip.get_tokenizer(name)(prompts), normalize=True)
        torch.testing.assert_close(score(images, prompts), (seen * said).sum(-1), atol=1e-6, rtol=0)


def test_weights_of_another_model_or_a_pickle_are_refused(tmp_path):
    name, model = tiny_hpsv2(tmp_path)
    state = dict(model.state_dict())
    state.pop("logit_scale")
    torch.save({"state_dict": state}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt is another model's, or not whole: .*logit_scale"):
        hpsv2_score(weights=str(tmp_path / "other.pt"), architecture=name)
    torch.save({"state_dict": Path}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="pickle.pt cannot be read as weights"):
        hpsv2_score(weights=str(tmp_path / "pickle.pt"), architecture=name)


SMALL_VISION = VISION | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_TEXT = TEXT | {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "encoder_hidden_size": 32,
}


def to_image_reward(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The package's names for our weights, written down from its source and not from our map of them."""
    found = {}
    for key, value in state.items():
        first, _, rest = key.partition(".")
        if first == "head":
            number, _, last = rest.partition(".")
            found[f"mlp.layers.{(0, 2, 4, 6, 7)[int(number)]}.{last}"] = value
        elif first == "text":
            found[f"blip.text_encoder.{rest}"] = value
        else:
            for ours, theirs in (
                ("embeddings.patch_embedding", "patch_embed.proj"), ("embeddings.class_embedding", "cls_token"),
                ("embeddings.position_embedding", "pos_embed"), ("post_layernorm", "norm"),
                ("encoder.layers", "blocks"), ("layer_norm", "norm"), ("self_attn.projection", "attn.proj"),
                ("self_attn.qkv", "attn.qkv"),
            ):
                rest = rest.replace(ours, theirs)
            found[f"blip.visual_encoder.{rest}"] = value
    return found


def test_imagereward_reads_the_packages_names_and_its_picture_tower_is_timms(tmp_path):
    import_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = ImageRewardModel(vision=SMALL_VISION, text=SMALL_TEXT).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("position_ids")}
    theirs = to_image_reward(state)
    extra = {"blip.vision_proj.weight": torch.zeros(1), "blip.text_encoder.embeddings.position_ids": torch.arange(512)}
    torch.save(theirs | extra, tmp_path / "ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "red"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")

    tower = VisionTransformer(
        img_size=224, patch_size=16, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2, num_classes=0, global_pool="",
        norm_layer=lambda width, **_: torch.nn.LayerNorm(width, eps=1e-6),
    ).eval()
    prefix = "blip.visual_encoder."
    tower.load_state_dict({k.removeprefix(prefix): v for k, v in theirs.items() if k.startswith(prefix)})
    images = pictures(2, side=224)
    with torch.no_grad():
        torch.testing.assert_close(
            model.vision(pixel_values=images).last_hidden_state, tower(images), atol=1e-4, rtol=1e-4
        )

    path = str(tmp_path / "ImageReward.pt")
    score = imagereward_score(weights=path, vision=SMALL_VISION, text=SMALL_TEXT, bf16=False)
    found = score(images, ["a red cat", "dog"])
    ids = torch.tensor([[2, 5, 8, 6, 3] + [0] * 30, [2, 7, 3] + [0] * 32])
    with torch.no_grad():
        wanted = model(normalised(images), ids, (ids > 0).long())
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    alone = score(images[1:], ["dog"])
    torch.testing.assert_close(alone, found[1:], atol=1e-5, rtol=1e-5)
    assert (score(images, ["dog", "dog"])[0] - found[0]).abs() > 1e-4


def open_clip_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' CLIP weights under OpenAI's names."""
    found = {
        "logit_scale": state["logit_scale"], "text_projection": state["text_projection.weight"].T,
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
    }
    norms = {"text_model.final_layer_norm": "ln_final", "vision_model.pre_layrnorm": "visual.ln_pre",
             "vision_model.post_layernorm": "visual.ln_post"}
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
             "mlp.fc2": "mlp.c_proj"}
    for kind in ("weight", "bias"):
        found |= {f"{new}.{kind}": state[f"{old}.{kind}"] for old, new in norms.items()}
        for tower, prefix in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
            for i in range(2):
                old, new = f"{tower}.encoder.layers.{i}", f"{prefix}.resblocks.{i}"
                found |= {f"{new}.{b}.{kind}": state[f"{old}.{a}.{kind}"] for a, b in parts.items()}
                split = [state[f"{old}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                found[f"{new}.attn.in_proj_{kind}"] = torch.cat(split)
    return {key: value.contiguous() for key, value in found.items()}


@pytest.mark.parametrize(
    ("quality", "given", "activation"),
    [
        ("clip", "file", "quick_gelu"),
        ("clip-l", "published", "quick_gelu"),
        ("clip:ViT-B-32:laion400m_e32", "published", "quick_gelu"),
        ("clip:ViT-B-32:laion400m-e32", "file", "quick_gelu"),
        ("clip:ViT-B-32:laion2b_s34b_b79k", "published", "gelu"),
        ("clip:ViT-B-32", "file", "gelu"),
        ("clip-h", "file", "gelu"),
    ],
)
def test_clip_computes_the_network_that_its_weights_were_trained_in(quality, given, activation, tmp_path, monkeypatch):
    import_torchvision()
    import open_clip.factory
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "hidden_act": activation}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(
        text_config=tower | {"eos_token_id": 49407}, vision_config=tower | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )).eval()
    for parameter in clip.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_file(open_clip_names(clip.state_dict()), tmp_path / "clip.safetensors")
    small = {
        "embed_dim": 8, "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    for name in ("ViT-L-14", "ViT-B-32", "ViT-H-14"):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, small)
    path = str(tmp_path / "clip.safetensors")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: path)
    score = load_quality(quality, weights=path if given == "file" else None, bf16=False)
    images, prompts = pictures(2, side=16), ["a cat", "a red apple"]
    ids = open_clip.get_tokenizer("ViT-L-14")(prompts)
    with torch.no_grad():
        found = clip(input_ids=ids, pixel_values=normalised(images))
    wanted = (found.image_embeds * found.text_embeds).sum(-1)
    torch.testing.assert_close(score(images, prompts), wanted, atol=1e-5, rtol=0)
