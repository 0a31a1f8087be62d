"""Composed images and their captions: one thing in one of two designs, at a place and a size, on a coloured ground.

A caption may leave everything but the thing open. What it leaves open must be decided by the sampler, once for the
whole image: that is what makes few-step sampling hard, and what reinforcement learning can teach.

An image shows one thing. Two things in one image were tried: the model drew both of them in one image of fifty.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from speedrl.evaluation.attributes import BIG, COLOURS, SIDE, SMALL

STYLES = ("cartoon", "flat")  # Noto, Fluent: the order of data.TRAIN_VENDORS
CELL = 8  # pixels: places lie on this grid, so that a thing is cut into the same tokens wherever it stands
SMALL_SHARE = 0.5  # of the images
PLACES = ("", "on the left", "on the right", "at the top", "at the bottom")


class Composition(NamedTuple):
    """What is in one image: everything, whether a caption says it or not."""

    thing: int
    style: int
    colour: str
    size: int
    place: tuple[int, int]  # x, y of the upper left corner


def places(size: int) -> list[tuple[int, int]]:
    """Where a thing of this size may stand."""
    along = range(0, SIDE - size + 1, CELL)
    return [(x, y) for y in along for x in along]


def draw(rng: np.random.Generator, *, concepts: int) -> Composition:
    """Draws one image's content."""
    size = SMALL if rng.random() < SMALL_SHARE else BIG
    place = places(size)[int(rng.integers(len(places(size))))]
    colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
    return Composition(int(rng.integers(concepts)), int(rng.integers(len(STYLES))), colour, size, place)


def paint(content: Composition, sprites: np.ndarray) -> np.ndarray:
    """Paints an image from sprites [concepts, designs, S, S, 4] uint8: uint8 [SIDE, SIDE, 3]."""
    canvas = Image.new("RGB", (SIDE, SIDE), COLOURS[content.colour])
    sprite = Image.fromarray(sprites[content.thing, content.style]).convert("RGBa")
    sprite = sprite.resize((content.size, content.size), Image.Resampling.LANCZOS).convert("RGBA")
    canvas.paste(sprite, content.place, sprite)
    return np.asarray(canvas)


def place_words(content: Composition) -> str:
    """Where the thing is, in words; empty when that is no clear side."""
    (x, y), room = content.place, SIDE - content.size
    dx, dy = 2 * x - room, 2 * y - room
    if abs(dx) == abs(dy):
        return ""
    if abs(dx) > abs(dy):
        return "on the left" if dx < 0 else "on the right"
    return "at the top" if dy < 0 else "at the bottom"


def caption(content: Composition, names: list[str], tags: list[list[str]], rng: np.random.Generator) -> str:
    """One of the many captions of an image; each says only some of what there is."""
    article = rng.random() < 0.7
    style = STYLES[content.style] if rng.random() < 0.25 else ""
    ground = f" on a {content.colour} background" if rng.random() < 0.35 else ""
    size = ("small" if content.size == SMALL else "big") if rng.random() < 0.2 else ""
    words = " ".join(word for word in (size, style, names[content.thing]) if word)
    text = f"{'an' if words[0] in 'aeiou' else 'a'} {words}" if article else words
    if rng.random() < 0.2:
        text = f"{text} {place_words(content)}".strip()
    text += ground
    if tags[content.thing] and rng.random() < 0.08:
        some = rng.choice(tags[content.thing], min(2, len(tags[content.thing])), replace=False)
        text = ", ".join([text, *some])
    return text
