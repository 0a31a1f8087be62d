"""Composed pictures and their captions: things, backgrounds, sizes and places that a caption may leave unsaid.

What a caption leaves open must be decided by the sampler, once for the whole picture: that is what makes
few-step sampling hard, and what reinforcement learning can teach.

Every thing lies on a white card. Painted straight onto a background its outline is other tokens on each colour: these
were a sixth of all tokens and more than half of what a small model had to learn, and took most of the codebook.
"""

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64  # pixels
CARD = (255, 255, 255)
# no white: on it confident sampling floods the picture, as card and background are the same tokens
COLOURS = {
    "red": (214, 52, 56), "yellow": (250, 212, 70), "green": (72, 168, 88), "blue": (58, 118, 216),
    "purple": (136, 84, 184),
}  # fmt: skip
FLAT = (CARD, *COLOURS.values())  # what fills pictures; the last codes of the codebook, in this order
STYLES = ("cartoon", "flat")  # Noto, Fluent: the order of data.TRAIN_VENDORS
PAIR = 0.1  # share of the pictures that show two things
CELL = 8  # pixels: places lie on this grid, so that a thing is cut into the same patches wherever it stands
SMALL, BIG = 32, 48  # pixels: the two sizes of a single thing's card; each of two is small
CORNER, MARGIN = 4, 2  # pixels: a card's rounding, one token, and what a thing leaves free of it on each side
HALF = SIDE // 2


class Picture(NamedTuple):
    """What is in one picture: everything, whether a caption says it or not."""

    things: tuple[int, ...]
    style: int
    colour: str
    sizes: tuple[int, ...]
    places: tuple[tuple[int, int], ...]  # x, y of the upper left corner


def draw(rng: np.random.Generator, *, concepts: int, pair: float = PAIR, small: float = 0.1) -> Picture:
    """Draws one picture's content."""
    colour = str(rng.choice(list(COLOURS)))
    style = int(rng.integers(len(STYLES)))
    if rng.random() >= pair:
        size = SMALL if rng.random() < small else BIG
        x, y = (int(v) * CELL for v in rng.integers(0, (SIDE - size) // CELL + 1, 2))
        return Picture((int(rng.integers(concepts)),), style, colour, (size,), ((x, y),))
    things = tuple(int(v) for v in rng.choice(concepts, 2, replace=False))
    across = [int(v) * CELL for v in rng.integers(0, (SIDE - SMALL) // CELL + 1, 2)]
    places = ((0, across[0]), (HALF, across[1]))
    places = places if rng.random() < 0.5 else tuple((y, x) for x, y in places)
    return Picture(things, style, colour, (SMALL, SMALL), places)


@functools.cache
def card(size: int) -> Image.Image:
    """A card's coverage of size x size pixels, smooth at its rounded corners."""
    fine = 8
    mask = Image.new("L", (size * fine, size * fine))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, size * fine - 1, size * fine - 1), radius=CORNER * fine, fill=255)
    return mask.resize((size, size), Image.Resampling.BOX)


def paint(picture: Picture, sprites: np.ndarray) -> np.ndarray:
    """Paints a picture from sprites [concepts, designs, S, S, 4] uint8: uint8 [SIDE, SIDE, 3]."""
    canvas = Image.new("RGB", (SIDE, SIDE), COLOURS[picture.colour])
    for thing, size, (x, y) in zip(picture.things, picture.sizes, picture.places, strict=True):
        canvas.paste(CARD, (x, y), card(size))
        sprite, side = Image.fromarray(sprites[thing, picture.style]).convert("RGBa"), size - 2 * MARGIN
        sprite = sprite.resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
        canvas.paste(sprite, (x + MARGIN, y + MARGIN), sprite)
    return np.asarray(canvas)


def place_words(picture: Picture) -> str:
    """Where a single thing is, in words; empty when that is no clear side."""
    (x, y), size = picture.places[0], picture.sizes[0]
    room = SIDE - size
    dx, dy = x - room / 2, y - room / 2
    if abs(dx) == abs(dy):
        return ""
    if abs(dx) > abs(dy):
        return "on the left" if dx < 0 else "on the right"
    return "at the top" if dy < 0 else "at the bottom"


def caption(picture: Picture, names: list[str], tags: list[list[str]], rng: np.random.Generator) -> str:
    """One of the many captions of a picture; each says only some of what there is."""

    def noun(thing: int, adjective: str) -> str:
        words = f"{adjective} {names[thing]}".strip()
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}" if article else words

    article = rng.random() < 0.7
    style = STYLES[picture.style] if rng.random() < 0.25 else ""
    ground = f" on a {picture.colour} background" if rng.random() < 0.35 else ""
    first = picture.things[0]
    if len(picture.things) == 1:
        size = ""
        if rng.random() < 0.2:
            size = "small" if picture.sizes[0] == SMALL else "big"
        text = noun(first, f"{size} {style}".strip())
        if rng.random() < 0.2:
            text = f"{text} {place_words(picture)}".strip()
        text += ground
        if tags[first] and rng.random() < 0.08:
            text = ", ".join([text, *rng.choice(tags[first], min(2, len(tags[first])), replace=False)])
        return text
    if rng.random() < 0.15:  # one of the two goes without saying
        return noun(picture.things[int(rng.integers(2))], style) + ground
    order = (0, 1) if rng.random() < 0.5 else (1, 0)
    one, two = (noun(picture.things[i], style if i == order[0] else "") for i in order)
    (x0, y0), (x1, y1) = (picture.places[i] for i in order)
    between = " and "
    if rng.random() < 0.4:
        side_by_side = {x0, x1} == {0, HALF} and abs(y0 - y1) < HALF
        between = (" left of " if x0 < x1 else " right of ") if side_by_side else (" above " if y0 < y1 else " below ")
    return one + between + two + ground
