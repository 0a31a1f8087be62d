"""Images as files, and sheets of images with labels."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from einops import rearrange
from torch import Tensor

from speedrl.system.files import write_atomically

if TYPE_CHECKING:
    from PIL import Image, ImageFont

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
LONGEST = 1000  # characters of a label that are looked at


def check_suffix(path: str | Path) -> str:
    """The format of an image's file by its suffix: PNG, JPEG or WEBP. ValueError for another suffix."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{path}: images are written as .png, .jpg or .webp, not as {suffix or 'a name without one'}")
    return FORMATS[suffix]


def save_image(image: "Image.Image", path: str | Path) -> None:
    """Writes an image in the format of the path's suffix, making its folder; the file is whole or not there.

    ValueError for another suffix than .png, .jpg, .jpeg and .webp.
    """
    kind = check_suffix(path)
    write_atomically(Path(path), lambda partial: image.save(partial, format=kind, quality=95))


def to_pil(image: Tensor, *, scale: int = 1) -> "Image.Image":
    """An image [3, H, W] in [0, 1] as a PIL image, every pixel `scale` x `scale`."""
    from PIL import Image

    pixels = rearrange(image.clamp(0, 1).mul(255).round().byte().cpu(), "c h w -> h w c")
    return Image.fromarray(pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy())


def contact_sheet(
    rows: Sequence[Tensor],
    *,
    labels: Sequence[str] = (),
    titles: Sequence[str] = (),
    scale: int = 1,
    gap: int = 4,
) -> "Image.Image":
    """Rows of images, each [n, 3, H, W] in [0, 1], on one white sheet: a PIL image.

    `labels` stand to the left of each row, `titles` above each column, both broken into lines; a label is cut where it
    is higher than its row, a title after 12 lines. `gap` in pixels. Rows may differ in n.
    """
    from PIL import Image, ImageDraw

    height, width = (side * scale for side in rows[0].shape[-2:])
    size = max(11, min(height, width) // 10)
    line = round(size * 1.25)
    at_left = [wrapped(text, size, max(2 * width, 8 * size), lines=max(1, height // line)) for text in labels]
    above = [wrapped(text, size, width, lines=12) for text in titles]
    left = max((width_of(part, size) for part in at_left), default=-gap) + 2 * gap
    top = max((part.count("\n") + 1 for part in above), default=0) * line + (2 * gap if above else gap)
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + columns * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)

    def write(text: str, x: int, y: int, anchor: str) -> None:
        if text:
            draw.text((x, y), text, fill="black", font=font_for(text, size), anchor=anchor, spacing=line - size)

    for i, row in enumerate(rows):
        y = top + i * (height + gap)
        write(at_left[i] if labels else "", gap, y + height // 2, "lm")
        for j, image in enumerate(row):
            sheet.paste(to_pil(image, scale=scale), (left + j * (width + gap), y))
    for j, text in enumerate(above):
        write(text, left + j * (width + gap), gap, "la")
    return sheet


def wrapped(text: str, size: int, width: int, *, lines: int) -> str:
    """A text broken into at most `lines` lines of `width` pixels; "" where no font has its letters."""
    text = " ".join(text[:LONGEST].split())
    font = font_for(text, size)
    if font is None:
        return ""
    found = [""]
    for word in re.findall(r"\S+ ?", text):
        # a word that is wider than a line is broken between its letters
        for part in [word] if font.getlength(word.rstrip()) <= width else word:
            if found[-1] and font.getlength((found[-1] + part).rstrip()) > width:
                found.append("")
            found[-1] += part
    if len(found) > lines:
        found = [*found[: lines - 1], found[lines - 1].rstrip()[:-1] + "..."]
    return "\n".join(part.rstrip() for part in found)


def width_of(text: str, size: int) -> int:
    font = font_for(text, size)
    return 0 if font is None else round(max(map(font.getlength, text.split("\n"))))


def font_for(text: str, size: int) -> "ImageFont.FreeTypeFont | ImageFont.ImageFont | None":
    """A font that has all letters of a text: Pillow's own for ASCII, else matplotlib's or a system font, else None."""
    from PIL import ImageFont

    letters = frozenset(text) - {"\n"}
    if all(letter.isascii() for letter in letters):
        return ImageFont.load_default(size)
    return next((ImageFont.truetype(path, size) for path in font_files() if letters <= letters_of(path)), None)


@functools.cache
def font_files() -> list[str]:
    """matplotlib's DejaVu Sans, then the system's fonts, sans serif first."""
    from matplotlib import font_manager, get_data_path

    system = sorted(font_manager.findSystemFonts(), key=lambda path: ("sans" not in path.lower(), path))
    return [f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", *system]


@functools.cache
def letters_of(path: str) -> frozenset[str]:
    """The letters that a font has; none where it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except Exception:  # a system's broken fonts are no concern of ours
        return frozenset()
