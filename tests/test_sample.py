"""Sampling images: guidance, seeds, batches, and that an image depends on its prompt, seed and number alone."""

import pytest
import torch
from speedrl.policies import from_random, make_policy

from speedrl.evaluation.figures import contact_sheet
from speedrl.generation import draw, sample
from speedrl.method.sampling import Noise
from speedrl.models.generator import decode, encode_prompts
from speedrl.models.loading import load_generator

PROMPTS = ["an owl", "a fox", "an elk", "a cat", "an owl"]


def tokens_of(generator, prompts=PROMPTS, **options):
    return draw(generator, prompts, **{"steps": 4} | options)[0]


@pytest.fixture
def counted(tiny_generator, monkeypatch):
    """The batch sizes that the tiny network was called with."""
    calls, features = [], tiny_generator.transformer.features

    def counting(tokens, *conditions):
        calls.append(len(tokens))
        return features(tokens, *conditions)

    monkeypatch.setattr(tiny_generator.transformer, "features", counting)
    return calls


@torch.no_grad()
@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 5), (3.0, 10)])
def test_guidance_extrapolates_from_the_negative_prompt_in_one_call(tiny_generator, counted, guidance, rows):
    tokens, timestep = torch.full((5, 16), tiny_generator.mask_id), torch.tensor([3, 2, 1, 0, 3])
    policy, every = make_policy(tiny_generator, PROMPTS, guidance=guidance), torch.arange(16).expand(5, -1)
    found = policy(tokens, timestep, torch.arange(5), every)
    assert counted == [rows]
    cond, uncond = (
        tiny_generator.transformer(tokens.view(5, 4, 4), timestep, *encode_prompts(tiny_generator, texts))
        for texts in (PROMPTS, [tiny_generator.negative] * 5)
    )
    torch.testing.assert_close(found, uncond + guidance * (cond - uncond), atol=1e-4, rtol=1e-4)


def test_images_are_reproducible_by_seed(tiny_generator):
    one = sample(tiny_generator, PROMPTS, steps=4, seed=1)
    assert one.shape == (5, 3, 16, 16) and one.dtype == torch.float32
    assert torch.equal(one, sample(tiny_generator, PROMPTS, steps=4, seed=1))
    assert not torch.equal(one, sample(tiny_generator, PROMPTS, steps=4, seed=2))
    assert not torch.equal(one[0], one[4]), "the second of the same prompt"


@pytest.mark.parametrize(
    "options",
    [{}, {"order": "random", "schedule": "linear", "guidance": 1.0}, {"order": "halton", "schedule": "arccos"},
     {"steps": 8, "remask": 0.5}],
)
def test_an_image_depends_on_its_prompt_its_seed_and_its_number_alone(tiny_generator, options):
    whole = tokens_of(tiny_generator, seed=3, **options)
    assert torch.equal(whole, tokens_of(tiny_generator, seed=3, batch=2, **options))
    for place, prompt in enumerate(PROMPTS[:4]):
        assert torch.equal(whole[place : place + 1], tokens_of(tiny_generator, [prompt], seed=3, **options))
    assert torch.equal(whole[[0, 4]], tokens_of(tiny_generator, ["an owl"] * 2, seed=3, **options))
    assert torch.equal(whole.flip(0)[1:4], tokens_of(tiny_generator, PROMPTS[1:4][::-1], seed=3, **options))


def test_one_string_in_place_of_a_list_is_one_clear_error(tiny_generator):
    with pytest.raises(ValueError, match=r"list of texts, like \['an owl'\], not one text") as caught:
        sample(tiny_generator, "an owl")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no prompt"):
        sample(tiny_generator, [], steps=4)


def test_the_models_own_settings_are_the_defaults(tiny_generator):
    tokens = tokens_of(tiny_generator)
    assert torch.equal(tokens, tokens_of(tiny_generator, guidance=3.0, temperature=1.5))
    assert not torch.equal(tokens, tokens_of(tiny_generator, guidance=1.0))
    assert not torch.equal(tokens, tokens_of(tiny_generator, temperature=40.0))
    own = tiny_generator._replace(schedule="arccos", order="halton")
    tokens = tokens_of(own)
    assert torch.equal(tokens, tokens_of(tiny_generator, schedule="arccos", order="halton"))
    assert not torch.equal(tokens, tokens_of(tiny_generator, order="halton"))
    assert not torch.equal(tokens, tokens_of(tiny_generator, schedule="arccos"))


def test_a_generator_that_starts_from_random_tokens_sees_its_share_of_them(tiny_generator, monkeypatch):
    seen = []

    def policy(tokens, timestep, samples, positions):
        seen.append(tokens)
        return torch.zeros(len(tokens), 16, 32)

    noise, every = Noise(torch.rand(3, 16), torch.rand(3, 16)), torch.arange(16).expand(3, -1)
    started = from_random(policy, noise, share=0.4, mask_id=39, codes=32)
    half = torch.arange(16).expand(3, -1).where(torch.arange(16) < 8, 39)
    started(torch.full((3, 16), 39), torch.zeros(3), torch.arange(3), every)
    started(half, torch.zeros(3), torch.arange(3), every)
    assert ((seen[0] < 32).sum(1) == 6).all() and ((seen[0] == 39).sum(1) == 10).all()
    assert torch.equal(seen[1], half), "once tokens are known, they are what it sees"
    distilled = tiny_generator._replace(random_share=0.4)
    tokens = tokens_of(distilled, steps=1)
    assert not torch.equal(tokens, tokens_of(tiny_generator, steps=1))
    assert torch.equal(tokens, tokens_of(distilled, steps=1, batch=2))
    monkeypatch.setattr("speedrl.generation.step_counts", lambda model, whole, steps: torch.tensor([1, 4, 1, 2, 1]))
    mixed, _ = draw(distilled, PROMPTS)
    assert torch.equal(mixed[0], tokens[0]), "whatever steps the others of its batch take"


@pytest.mark.parametrize("steps", [1, 16])
def test_every_number_of_steps_up_to_the_tokens_gives_finished_tokens(tiny_generator, steps):
    tokens = tokens_of(tiny_generator, steps=steps)
    assert tokens.min() >= 0 and tokens.max() < tiny_generator.codes


@pytest.mark.parametrize("steps", [0, -1, 17])
def test_other_numbers_of_steps_are_errors(tiny_generator, steps):
    with pytest.raises(ValueError, match="1 to 16"):
        sample(tiny_generator, PROMPTS, steps=steps)


def test_sheets_hold_every_image_in_its_place():
    red, blue = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
    red[0], blue[2] = 1, 1
    sheet = contact_sheet([torch.stack([red, blue]), blue[None]], scale=2, gap=4)
    assert sheet.size == (4 + 2 * 20, 4 + 2 * 20)
    assert sheet.getpixel((10, 10)) == (255, 0, 0) and sheet.getpixel((30, 10)) == (0, 0, 255)
    assert sheet.getpixel((10, 30)) == (0, 0, 255) and sheet.getpixel((30, 30)) == (255, 255, 255)


def test_the_embedded_model_draws():
    try:
        generator = load_generator("embedded")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert generator.grid == (16, 16) and generator.size == (64, 64)
    images = decode(generator, tokens_of(generator, ["a red apple on a blue background"] * 2, steps=8))
    assert images.shape == (2, 3, 64, 64) and images.std() > 0.05
