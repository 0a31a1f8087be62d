"""Sampling pictures: guidance, seeds, batches, and sheets."""

import pytest
import torch
from PIL import Image

from speedrl.generation import contact_sheet, from_random, generate, guided_policy, sample, save_png, to_pil
from speedrl.method.sampling import Noise
from speedrl.models.checkpoint import decode, encode_prompts, load_generator

PROMPTS = ["an owl", "a fox", "an elk", "a cat", "an owl"]


@pytest.fixture
def counted(tiny_generator, monkeypatch):
    """The tiny network, and the batch sizes that it was called with."""
    calls, network = [], tiny_generator.transformer
    features = network.features

    def counting(tokens, *conditions):
        calls.append(len(tokens))
        return features(tokens, *conditions)

    monkeypatch.setattr(network, "features", counting)
    return network, calls


@torch.no_grad()
def test_guidance_1_is_the_conditional_network_in_one_call(tiny_generator, counted):
    network, calls = counted
    prompts, empty = encode_prompts(tiny_generator, PROMPTS), encode_prompts(tiny_generator, [""])
    tokens, timestep = torch.full((5, 16), tiny_generator.mask_id), torch.full((5,), 3)
    policy = guided_policy(network, prompts, empty, guidance=1, grid=(4, 4))
    found = policy(tokens, timestep)
    assert calls == [5]
    assert torch.equal(found, network(tokens.view(5, 4, 4), timestep, *prompts))


@torch.no_grad()
@pytest.mark.parametrize("empties", [1, 5])
def test_guidance_extrapolates_from_the_empty_prompt_in_one_call(tiny_generator, counted, empties):
    network, calls = counted
    prompts, empty = encode_prompts(tiny_generator, PROMPTS), encode_prompts(tiny_generator, [""] * empties)
    tokens, timestep = torch.full((5, 16), tiny_generator.mask_id), torch.tensor([3, 2, 1, 0, 3])
    policy = guided_policy(network, prompts, empty, guidance=3, grid=(4, 4))
    found = policy(tokens, timestep)
    assert calls == [10]
    cond, uncond = (
        network(tokens.view(5, 4, 4), timestep, *encode_prompts(tiny_generator, texts)) for texts in (PROMPTS, [""] * 5)
    )
    torch.testing.assert_close(found, uncond + 3 * (cond - uncond))


def test_pictures_are_reproducible_by_seed(tiny_generator):
    one = sample(tiny_generator, PROMPTS, steps=4, seed=1)
    assert one.shape == (5, 3, 16, 16) and one.dtype == torch.float32
    assert torch.equal(one, sample(tiny_generator, PROMPTS, steps=4, seed=1))
    assert not torch.equal(one, sample(tiny_generator, PROMPTS, steps=4, seed=2))
    assert not torch.equal(one[0], one[4])  # the same prompt with the noise of another index


@pytest.mark.parametrize(
    "options",
    [{}, {"order": "random", "schedule": "linear", "guidance": 1.0}, {"order": "halton", "schedule": "arccos"}],
)
def test_pictures_do_not_depend_on_the_batch(tiny_generator, options):
    whole = generate(tiny_generator, PROMPTS, steps=3, **options)
    assert torch.equal(whole, generate(tiny_generator, PROMPTS, steps=3, batch=2, **options))
    assert torch.equal(whole[:2], generate(tiny_generator, PROMPTS[:2], steps=3, **options))


def test_the_models_own_guidance_and_temperature_are_the_defaults(tiny_generator):
    tokens = generate(tiny_generator, PROMPTS, steps=4)
    assert torch.equal(tokens, generate(tiny_generator, PROMPTS, steps=4, guidance=3.0, temperature=1.5))
    assert not torch.equal(tokens, generate(tiny_generator, PROMPTS, steps=4, guidance=1.0))
    assert not torch.equal(tokens, generate(tiny_generator, PROMPTS, steps=4, temperature=40.0))


def test_the_models_own_schedule_and_order_are_the_defaults(tiny_generator):
    own = tiny_generator._replace(schedule="arccos", order="halton")
    tokens = generate(own, PROMPTS, steps=4)
    assert torch.equal(tokens, generate(tiny_generator, PROMPTS, steps=4, schedule="arccos", order="halton"))
    assert not torch.equal(tokens, generate(tiny_generator, PROMPTS, steps=4, order="halton"))
    assert not torch.equal(tokens, generate(tiny_generator, PROMPTS, steps=4, schedule="arccos"))


def test_a_generator_that_starts_from_random_tokens_sees_its_share_of_them(tiny_generator):
    seen = []

    def policy(tokens, timestep):
        seen.append(tokens)
        return torch.zeros(len(tokens), 16, 32)

    noise = Noise(torch.rand(3, 16), torch.rand(3, 16))
    started = from_random(policy, noise, share=0.4, mask_id=39, codes=32)
    half = torch.arange(16).expand(3, -1).where(torch.arange(16) < 8, 39)
    started(torch.full((3, 16), 39), torch.zeros(3))
    started(half, torch.zeros(3))
    assert ((seen[0] < 32).sum(1) == 6).all() and ((seen[0] == 39).sum(1) == 10).all()
    assert torch.equal(seen[1], half), "once tokens are known, they are what it sees"
    distilled = tiny_generator._replace(random_share=0.4)
    tokens = generate(distilled, PROMPTS, steps=1)
    assert not torch.equal(tokens, generate(tiny_generator, PROMPTS, steps=1))
    assert torch.equal(tokens, generate(distilled, PROMPTS, steps=1, batch=2))


@pytest.mark.parametrize("steps", [1, 16])
def test_every_number_of_steps_up_to_the_tokens_gives_finished_tokens(tiny_generator, steps):
    tokens = generate(tiny_generator, PROMPTS, steps=steps)
    assert tokens.min() >= 0 and tokens.max() < tiny_generator.codes


@pytest.mark.parametrize("steps", [0, -1, 17])
def test_other_numbers_of_steps_and_no_prompts_are_errors(tiny_generator, steps):
    with pytest.raises(ValueError, match="1 to 16"):
        sample(tiny_generator, PROMPTS, steps=steps)
    with pytest.raises(ValueError, match="no prompt"):
        sample(tiny_generator, [], steps=4)


def test_sheets_hold_every_picture_in_its_place():
    red, blue = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
    red[0], blue[2] = 1, 1
    sheet = contact_sheet([torch.stack([red, blue]), blue[None]], scale=2, gap=4)
    assert sheet.size == (4 + 2 * 20, 4 + 2 * 20)
    assert sheet.getpixel((10, 10)) == (255, 0, 0) and sheet.getpixel((30, 10)) == (0, 0, 255)
    assert sheet.getpixel((10, 30)) == (0, 0, 255) and sheet.getpixel((30, 30)) == (255, 255, 255)
    labelled = contact_sheet([torch.stack([red, blue]), blue[None]], labels=["before", "after"], titles=["a", "b" * 99])
    assert labelled.width > 44 and labelled.getpixel((labelled.width - 8, labelled.height - 8)) == (255, 255, 255)


def test_png_round_trip(tmp_path):
    picture = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    save_png(to_pil(picture, scale=3), tmp_path / "new/picture.png")
    with Image.open(tmp_path / "new/picture.png") as image:
        assert image.size == (21, 15) and image.format == "PNG"
        assert image.getpixel((20, 14)) == tuple(int(v) for v in (picture[:, -1, -1] * 255).round())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["picture.png"]


def test_the_embedded_model_draws(request):
    try:
        generator = load_generator("embedded")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert generator.grid == (16, 16) and generator.size == (64, 64)
    assert sum(p.numel() for p in generator.transformer.parameters()) < 10_000_000
    pictures = decode(generator, generate(generator, ["a red apple on a blue background"] * 2, steps=8))
    assert pictures.shape == (2, 3, 64, 64) and pictures.std() > 0.05
