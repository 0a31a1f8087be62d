"""A transformer of the reader's own: the page's example, and what saving and loading say of it."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from speedrl.generation import draw
from speedrl.models.generator import Transformer
from speedrl.models.loading import load_generator, save_generator

PAGE = Path(__file__).parents[1] / "docs/own-model.md"


def test_the_example_of_the_page_samples_trains_saves_and_loads(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    generator, again = names["generator"], names["again"]
    assert names["images"].shape == (1, 3, 64, 64)
    assert type(again.transformer) is names["Mixer"] and again.config == {"_class_name": "Mixer", "width": 96}
    assert torch.equal(draw(again, ["a cat"], steps=2)[0], draw(generator, ["a cat"], steps=2)[0])
    with pytest.raises(ValueError, match=r"class Mixer: load_generator\(..., transformer=Mixer\)"):
        load_generator("mixer")


class Tiny(Transformer):
    """For the tiny generator: 32 codes; a buffer that no file holds."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.codes, self.vocabulary = 32, 40
        self.embed, self.out = nn.Embedding(40, width), nn.Linear(width, 32)
        self.register_buffer("scale", torch.full((width,), 3.0), persistent=False)

    def features(self, tokens, timestep, text, pooled, micro_conds):
        return self.embed(tokens.flatten(1)) * self.scale + text.mean() + timestep[:, None, None]

    def head(self, features):
        return self.out(features)


def test_a_configuration_of_another_transformer_is_refused_when_it_is_saved(tiny_generator, tmp_path):
    own = tiny_generator._replace(transformer=Tiny())
    with pytest.raises(ValueError, match=r"does not describe its transformer .*_replace\(config=.* of Tiny"):
        save_generator(own, tmp_path / "own")
    assert not any(tmp_path.iterdir())


def test_a_generator_of_another_size_and_mask_is_saved_with_both(tiny_generator, tmp_path):
    config = {"width": 4}
    own = tiny_generator._replace(transformer=Tiny(**config), config=config, grid=(4, 8), size=(16, 32), mask_id=33)
    save_generator(own, tmp_path / "own")
    again = load_generator(tmp_path / "own", transformer=Tiny)
    assert (again.grid, again.size, again.mask_id, again.codes) == ((4, 8), (16, 32), 33, 32)
    assert torch.equal(draw(again, ["a cat"], steps=3)[0], draw(own, ["a cat"], steps=3)[0])
    low = load_generator(tmp_path / "own", transformer=Tiny, dtype=torch.bfloat16)
    assert low.transformer.out.weight.dtype == torch.bfloat16


def test_what_a_transformer_lacks_is_said(tiny_generator):
    class Headless(Tiny):
        head = Transformer.head

    with pytest.raises(NotImplementedError, match="Headless has no head"):
        draw(tiny_generator._replace(transformer=Headless()), ["a cat"], steps=1)
