"""Images as files: PNGs, and sheets of images with labels."""

from pathlib import Path
from typing import TYPE_CHECKING

from einops import rearrange
from torch import Tensor

from speedrl.system.files import write_atomically

if TYPE_CHECKING:
    from PIL import Image


def to_pil(picture: Tensor, *, scale: int = 1) -> "Image.Image":
    """A picture [3, H, W] in [0, 1] as a PIL image, every pixel `scale` x `scale`."""
    from PIL import Image

    pixels = rearrange(picture.clamp(0, 1).mul(255).round().byte().cpu(), "c h w -> h w c")
    pixels = pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return Image.fromarray(pixels.numpy())


def contact_sheet(
    rows: list[Tensor],
    *,
    labels: list[str] | None = None,
    titles: list[str] | None = None,
    scale: int = 1,
    gap: int = 4,
) -> "Image.Image":
    """Rows of pictures, each [n, 3, H, W] in [0, 1], on one white sheet: a PIL image.

    `labels` stand to the left of each row, `titles` above each column, both cut where they are too long; `gap` in
    pixels. Rows may differ in n.
    """
    from PIL import Image, ImageDraw, ImageFont

    labels = [label if len(label) <= 120 else label[:120] + "..." for label in labels or []]
    height, width = (side * scale for side in rows[0].shape[-2:])
    font = ImageFont.load_default(max(11, min(height, width) // 10))
    box = [font.getbbox(label) for label in labels or []]
    left = max((right for _, _, right, _ in box), default=-gap) + 2 * gap
    top = font.getbbox("Ay")[3] + 2 * gap if titles else gap
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + columns * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        y = top + i * (height + gap)
        if labels:
            draw.text((gap, y + height // 2), labels[i], fill="black", font=font, anchor="lm")
        for j, picture in enumerate(row):
            sheet.paste(to_pil(picture, scale=scale), (left + j * (width + gap), y))
    for j, title in enumerate(titles or []):
        shown = title[:120]
        while shown and font.getlength(shown) > width:
            shown = shown[:-1]
        draw.text((left + j * (width + gap), gap), shown, fill="black", font=font)
    return sheet


def save_png(image: "Image.Image", path: Path) -> None:
    """Writes a PNG, making its folder: to a temporary name first, so that a file of this name is always whole."""
    write_atomically(Path(path), lambda partial: image.save(partial, format="PNG"))
