"""Sampling images: guidance, seeds, batches, and that an image depends on its prompt, seed and number alone."""

import pytest
import torch

from speedrl.evaluation.figures import contact_sheet
from speedrl.generation import draw, make_policy, sample, search_sampler
from speedrl.method.search import scalars_at
from speedrl.models.generator import decode, encode_prompts
from speedrl.models.loading import load_generator

PROMPTS = ["an owl", "a fox", "an elk", "a cat", "an owl"]


def tokens_of(generator, prompts=PROMPTS, *, how=None, **options):
    """`how` are settings in place of those of the generator's sampler."""
    sampler = generator.sampler.replace(**how or {})
    return draw(generator, prompts, **{"steps": 4, "sampler": sampler} | options)[0]


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
    [{}, {"how": {"order": "random", "schedule": "linear", "guidance": 1.0}},
     {"how": {"order": "halton", "schedule": "arccos"}}, {"steps": 8, "how": {"remask": 0.5}}],
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
    tokens, _ = draw(tiny_generator, PROMPTS, steps=4)
    assert torch.equal(tokens, tokens_of(tiny_generator, how={"guidance": 3.0, "temperature": 1.5}))
    assert not torch.equal(tokens, tokens_of(tiny_generator, how={"guidance": 1.0}))
    assert not torch.equal(tokens, tokens_of(tiny_generator, how={"temperature": 40.0}))
    own = tiny_generator._replace(sampler=tiny_generator.sampler.replace(schedule="arccos", order="halton"))
    tokens, _ = draw(own, PROMPTS, steps=4)
    assert torch.equal(tokens, tokens_of(tiny_generator, how={"schedule": "arccos", "order": "halton"}))
    assert not torch.equal(tokens, tokens_of(tiny_generator, how={"order": "halton"}))
    assert not torch.equal(tokens, tokens_of(tiny_generator, how={"schedule": "arccos"}))


def test_scalars_for_each_image_are_in_place_of_those_of_the_samplers_table(tiny_generator):
    table, counts = torch.full((7, 4), 0.5), torch.full((5,), 4)
    own = tokens_of(tiny_generator, how={"scalars": table})
    given = tokens_of(tiny_generator, scalars=scalars_at(table, counts), batch=2)
    assert torch.equal(own, given) and not torch.equal(own, tokens_of(tiny_generator))
    mixed = scalars_at(table, counts)._replace(logit_scale_first=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert torch.equal(tokens_of(tiny_generator, scalars=mixed), tokens_of(tiny_generator, scalars=mixed, batch=2))


def test_a_search_gives_the_sampler_with_a_table_and_starts_from_the_one_that_it_has(tiny_generator):
    def quality(images, texts):
        return images[:, 0].mean((1, 2))

    how = {"rounds": 2, "groups": 2, "group_size": 4}
    choices = torch.tensor([1, 4])
    found = search_sampler(tiny_generator, PROMPTS, quality, choices, **how)
    assert found == tiny_generator.sampler, "but for the table"
    assert found.scalars.shape == (7, 4) and found.scalars[[0, 2]].abs().max() > 0
    assert not found.scalars[4:].any(), "counts that were not tried keep their scalars"
    assert torch.equal(search_sampler(tiny_generator, PROMPTS, quality, choices, **how).scalars, found.scalars)
    flat = search_sampler(tiny_generator, PROMPTS, lambda images, texts: torch.zeros(len(images)), choices,
                          sampler=found, **how)
    assert torch.equal(flat.scalars, found.scalars), "nothing is better than where it starts"


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
