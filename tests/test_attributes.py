"""Ground, size and place, read from images that are painted as the embedded model's are."""

import itertools

import numpy as np
import pytest
import torch

from experiments.embedded import compose
from speedrl.evaluation.attributes import COLOURS, attribute_shares, named_attributes, read_attributes

SPRITES = {  # drawn into the whole sprite, as those of the packages are
    "white square": (255, 255, 255), "black square": (20, 20, 20), "brown square": (130, 80, 40),
}
SIZES = {"small": compose.SMALL, "big": compose.BIG}


def painted(contents, colour=(255, 255, 255), mask=None):
    sprites = np.zeros((1, 1, 128, 128, 4), np.uint8)
    sprites[..., :3], sprites[..., 3] = colour, 255
    if mask is not None:
        sprites[..., 3] = np.where(mask, 255, 0)
    images = np.stack([compose.paint(content, sprites) for content in contents])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


def everything():
    return [compose.Composition(0, 0, colour, size, place)
            for colour in COLOURS for size in SIZES.values() for place in compose.places(size)]


@pytest.mark.parametrize("name", SPRITES)
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_every_ground_size_and_place_is_read_right(name, noise):
    contents = everything()
    images = painted(contents, SPRITES[name])
    images = (images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    for content, read in zip(contents, read_attributes(images), strict=True):
        assert read["ground"] == content.colour
        assert SIZES[read["size"]] == content.size
        assert read["place"] == compose.place_words(content).removeprefix("on the ").removeprefix("at the ")


def test_a_thing_that_fills_only_a_part_of_its_box_is_read_as_well():
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    for mask in (x**2 + y**2 <= 1, abs(y) <= 0.4, abs(x) + abs(y) <= 1):  # a disc, a wide bar, a diamond
        contents = everything()
        for content, read in zip(contents, read_attributes(painted(contents, (20, 20, 20), mask)), strict=True):
            assert read == {"ground": content.colour, "size": "small" if content.size == compose.SMALL else "big",
                            "place": compose.place_words(content)[7:]}


def test_every_wrong_value_is_told():
    contents = everything()
    images = painted(contents)
    values = {
        "ground": {colour: f"a cat on a {colour} background" for colour in COLOURS},
        "size": {size: f"a {size} cat" for size in SIZES},
        "place": {"left": "cat on the left", "right": "cat on the right", "top": "cat at the top",
                  "bottom": "cat at the bottom"},
    }
    truth = [
        {"ground": content.colour, "size": "small" if content.size == compose.SMALL else "big",
         "place": compose.place_words(content)[7:]}
        for content in contents
    ]
    told = 0
    for name, prompts in values.items():
        for (asked, prompt), (image, true) in itertools.product(prompts.items(), zip(images, truth, strict=True)):
            found = attribute_shares(image[None], [prompt])
            assert found[name] == float(true[name] == asked), (prompt, true)
            assert all(share is None for other, share in found.items() if other != name)
            told += true[name] != asked
    assert told > 300


def test_a_patchwork_and_an_image_without_a_ground_are_told():
    (image,) = painted([compose.Composition(0, 0, "blue", compose.SMALL, (8, 8))])
    image[:, 20:, :] = torch.tensor(COLOURS["red"])[:, None, None] / 255
    assert read_attributes(image[None])[0]["ground"] == "red", "what the larger part of the border has"
    empty = read_attributes(torch.stack([torch.full((3, 64, 64), 0.5), torch.full((3, 64, 64), 1.0)]))
    assert empty == [{"ground": "", "size": "", "place": ""}] * 2
    plain = torch.tensor(COLOURS["green"])[:, None, None].expand(3, 64, 64) / 255
    assert read_attributes(plain[None]) == [{"ground": "green", "size": "", "place": ""}]
    with pytest.raises(ValueError, match=r"\[B, 3, 64, 64\]"):
        read_attributes(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a small cartoon cat on the left on a blue background", {"ground": "blue", "size": "small", "place": "left"}),
        ("Big dog at the Top", {"size": "big", "place": "top"}),
        ("a red apple on a yellow background, small", {"ground": "yellow"}),
        ("smaller birds on an orange background", {}),
        ("a top hat", {}),
    ],
)
def test_what_a_prompt_names(prompt, named):
    assert named_attributes(prompt) == named


def test_shares_are_over_the_images_whose_prompts_name_it():
    images = painted([compose.Composition(0, 0, colour, compose.SMALL, (0, 8)) for colour in ("red", "red", "blue")])
    found = attribute_shares(images, ["a cat on a red background", "cat on a blue background", "cat"])
    assert found == {"ground": 0.5, "size": None, "place": None}


def test_every_caption_of_the_embedded_models_images_is_read_right():
    rng = np.random.default_rng(0)
    contents = [compose.draw(rng, concepts=1) for _ in range(200)]
    captions = [compose.caption(content, ["cat"], [["pet"]], rng) for content in contents]
    contents = [content._replace(style=0) for content in contents]
    assert attribute_shares(painted(contents), captions) == {"ground": 1.0, "size": 1.0, "place": 1.0}
