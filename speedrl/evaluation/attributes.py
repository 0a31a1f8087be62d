"""What a prompt of the embedded model names beside its concept, read from pixels: ground, size and place.

An image of that model shows one thing, SMALL or BIG, on a ground of one of COLOURS (experiments/embedded/compose.py).
The design, "cartoon" or "flat", is not read: it would need a reference of each concept in each design.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 64  # pixels
# no white: on it confident sampling floods the image
COLOURS = {  # paler than most things, which are seen on all of them
    "red": (228, 116, 116), "yellow": (252, 230, 150), "green": (136, 202, 146), "blue": (122, 170, 236),
    "purple": (174, 142, 214),
}
SMALL, BIG = 48, 56  # pixels: the longer side of a thing; at 40 the tokenizer loses a third of the judge's R@1
EDGE = 4  # pixels: the border whose colour is the ground's
NEAR = 48.0  # of 255, Euclidean: a pixel this near a colour has it
PATTERNS = {
    "ground": rf"\bon an? ({'|'.join(COLOURS)}) background\b",
    "size": r"\b(small|big)\b",
    "place": r"\b(?:on the|at the) (left|right|top|bottom)\b",
}


def named_attributes(prompt: str) -> dict[str, str]:
    """What a prompt names, of ground, size and place: "a small cat on a red background" -> ground red, size small."""
    text = prompt.lower().split(",")[0]  # tags follow a comma
    found = {name: re.search(pattern, text) for name, pattern in PATTERNS.items()}
    return {name: match[1] for name, match in found.items() if match}


def read_attributes(images: Tensor) -> list[dict[str, str]]:
    """Ground, size and place of images [B, 3, SIDE, SIDE] in [0, 1]; "" where one cannot be told.

    Ground: the most frequent of COLOURS among the border's pixels. Size and place: the bounding box of the rows and
    columns in which two or more pixels have another colour; a thing in the middle or in a corner has no place.
    ValueError for another shape.
    """
    if images.shape[1:] != (3, SIDE, SIDE):
        raise ValueError(f"images must be [B, 3, {SIDE}, {SIDE}], got {tuple(images.shape)}")
    ring = torch.ones(SIDE, SIDE, dtype=torch.bool)
    ring[EDGE:-EDGE, EDGE:-EDGE] = False
    pixels = images.float().cpu().permute(0, 2, 3, 1) * 255
    distance = torch.cdist(pixels.flatten(1, 2), torch.tensor([*COLOURS.values()]).float())  # [B, SIDE * SIDE, colours]
    nearest, colour = distance.unflatten(1, (SIDE, SIDE)).min(-1)
    counts = (F.one_hot(colour, len(COLOURS)) * (nearest < NEAR)[..., None])[:, ring].sum(1)
    found = []
    for image, votes in zip(pixels, counts, strict=True):
        ground = int(votes.argmax())
        own = torch.tensor([*COLOURS.values()][ground]).float()
        thing = (image - own).norm(dim=-1) >= NEAR
        read = {"ground": [*COLOURS][ground] if votes.any() else ""}
        found.append(read | (size_and_place(thing) if votes.any() else {"size": "", "place": ""}))
    return found


def size_and_place(thing: Tensor) -> dict[str, str]:
    """Size and place of a thing by its mask, bool [SIDE, SIDE]; a size nearer to nothing than to SMALL is "" too."""
    rows, columns = (torch.nonzero(thing.sum(axis) > 1).flatten().tolist() for axis in (1, 0))
    if not rows or not columns:
        return {"size": "", "place": ""}
    longer = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    right, down = columns[0] + columns[-1] + 1 - SIDE, rows[0] + rows[-1] + 1 - SIDE  # twice the centre's offset
    place = ""
    if abs(right) - abs(down) > SIDE // 8:
        place = "left" if right < 0 else "right"
    elif abs(down) - abs(right) > SIDE // 8:
        place = "top" if down < 0 else "bottom"
    size = "" if longer < SMALL / 2 else "small" if longer < (SMALL + BIG) / 2 else "big"
    return {"size": size, "place": place}


def attribute_shares(images: Tensor, prompts: list[str]) -> dict[str, float | None]:
    """The share of images [B, 3, SIDE, SIDE] that have the ground, the size and the place that their prompts name.

    None for what no prompt names. ValueError where there are not B prompts.
    """
    wanted = [named_attributes(prompt) for prompt in prompts]
    shares: dict[str, float | None] = {}
    read = read_attributes(images)
    for name in PATTERNS:
        right = [of[name] == asked[name] for of, asked in zip(read, wanted, strict=True) if name in asked]
        shares[name] = sum(right) / len(right) if right else None
    return shares
