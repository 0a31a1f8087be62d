"""Images as files: formats by suffix, whole files, and labels that are read or left out."""

import pytest
import torch
from PIL import Image

from speedrl.evaluation.figures import check_suffix, contact_sheet, font_for, save_image, to_pil, wrapped


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "PNG"), ("b.JPG", "JPEG"), ("c.jpeg", "JPEG"), ("d.webp", "WEBP")]
)
def test_the_suffix_says_the_format(tmp_path, name, kind):
    image = torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(0))
    save_image(to_pil(image, scale=2), tmp_path / "new" / name)
    with Image.open(tmp_path / "new" / name) as found:
        assert (found.format, found.size) == (kind, (24, 16))
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.gif", "a", "a.png.txt"])
def test_other_suffixes_are_refused_in_one_line_before_anything_is_written(tmp_path, name):
    for act in (check_suffix, lambda path: save_image(Image.new("RGB", (2, 2)), path)):
        with pytest.raises(ValueError, match=r"written as \.png, \.jpg or \.webp, not as ") as error:
            act(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_long_texts_are_broken_into_lines_and_told_in_full():
    text = "a big yellow star at the top of a blue background"
    lines = wrapped(text, 12, 100, lines=12).split("\n")
    assert " ".join(lines) == text and len(lines) > 2
    assert all(font_for(text, 12).getlength(line) <= 100 for line in lines)
    assert wrapped("x" * 40, 12, 100, lines=12).replace("\n", "") == "x" * 40
    assert wrapped(text, 12, 100, lines=2).endswith("...")


def test_letters_that_no_font_has_are_left_out_and_the_sheet_keeps_its_images():
    assert font_for("красная кошка", 12) is not None
    assert font_for("\U000e0041 tag", 12) is None and wrapped("\U000e0041", 12, 100, lines=1) == ""
    rows = [torch.zeros(2, 3, 16, 16), torch.ones(1, 3, 16, 16)]
    bare, labelled = contact_sheet(rows), contact_sheet(rows, labels=["\U000e0041", "a"], titles=["b", "c"])
    assert bare.size == (44, 44) and labelled.size[0] > 44 and labelled.size[1] > 44
    assert bare.getpixel((5, 5)) == (0, 0, 0) and bare.getpixel((30, 30)) == (255, 255, 255)
