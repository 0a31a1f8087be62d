"""The study on a tiny generator: it runs, keeps what is finished, and says what it did."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

import speedrl.evaluation.measuring
from experiments.study import __main__ as study
from experiments.study import pace
from experiments.study.__main__ import against, best_settings, chosen_lr
from speedrl.studies.ablations import ablations


@pytest.fixture
def app(monkeypatch):
    import typer

    monkeypatch.setattr(
        speedrl.evaluation.measuring, "judge_if_there", lambda device, console: None
    )  # seconds, for every row
    app = typer.Typer()
    app.command()(study.main)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_the_study_compares_every_method_and_keeps_what_is_finished(app, tiny_generator_folder, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a b\nc d\ne f\ng h\n", encoding="utf-8")
    (tmp_path / "brightness.py").write_text(
        "def score(images, prompts):\n    return images.mean((1, 2, 3))\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--quick", "--base", tiny_generator_folder, "--out", tmp_path / "out", "--quality", "brightness:score",
               "--prompts", tmp_path / "prompts.txt", "--eval-prompts", tmp_path / "prompts.txt", "--steps", "2-4",
               "--lrs", "1e-3"]  # fmt: skip
    assert app(*options).exit_code == 0
    report = tmp_path / "out/report"
    found = json.loads((report / "study.json").read_text(encoding="utf-8"))
    assert not found["failed"]
    methods = {row["model"] for row in found["rows"]}
    trained = {"reinforcement learning", "fine-tuning", "one-step distillation"}
    variants = ("own settings", "best settings", "random", "halton", "linear", "arccos", "square")
    assert methods == trained | {"base", *(f"base, {name}" for name in variants)}
    alone = ("one-step distillation", "base, own settings")  # at one step count each
    assert {row["network_calls"] for row in found["rows"] if row["model"] not in alone} == {1, 4}
    assert {row["steps"] for row in found["rows"] if row["model"] == "one-step distillation"} == {1}
    assert all(row["reward_interval"] is not None for row in found["rows"])
    assert set(found["picked"]) == trained
    assert (
        found["budgets"]["fine-tuning"]["pictures_seen"]
        == found["budgets"]["one-step distillation"]["pictures_seen"]
        == 8
    )
    assert any(line.startswith("python -m experiments.alternatives.distil --out") for line in
               found["commands"]["one-step distillation"])  # fmt: skip
    page = (report / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:", page) and "outside the noise" in page
    for name in ("pareto-given.png", "pareto-given.svg", "equal_calls.png", "study.md"):
        assert (report / name).stat().st_size > 500

    def refuse(*_, **__):
        raise AssertionError("what is finished is kept")

    for name in ("finetune", "distil", "trained_once"):
        monkeypatch.setattr(study, name, refuse)
    monkeypatch.setattr(speedrl.evaluation.measuring, "one_cell", refuse)
    assert app(*options).exit_code == 0
    others = ["2-3" if option == "2-4" else option for option in options]
    assert app(*others).exit_code == 0
    failed = json.loads((report / "study.json").read_text(encoding="utf-8"))["failed"]
    assert set(failed) == trained - {"one-step distillation"}
    assert all("holds a run of other options" in why for why in failed.values())


def test_settings_and_learning_rates_are_chosen_by_the_reward(monkeypatch, tmp_path):
    def evaluate(models, *, out, steps, guidance, temperature=(2.0,), **_):
        calls = 1 if guidance[0] == 1 else 2
        return [{"steps": s, "guidance": guidance[0], "temperature": t, "network_calls": s * calls,
                 "reward": -abs(t - s / 4) - (s == 8) * 0.1 - float(models[0] != "b") * 0.5}
                for s in steps for t in temperature]  # fmt: skip

    monkeypatch.setattr(study, "evaluate", evaluate)
    monkeypatch.setattr(study, "trained", lambda method, folder, *, lr, **_: "b" if lr == 3 else "a")
    best = best_settings("b", tmp_path, [1, 4, 8], guidances=(1.0, 3.0), selection={})
    assert [one["steps"][0] * (1 if one["guidance"] == (1.0,) else 2) for one in best] == [1, 4, 8]
    assert best[1] == {"steps": (4,), "guidance": (1.0,), "temperature": (1.0,)}
    assert best[2] == {"steps": (4,), "guidance": (3.0,), "temperature": (1.0,)}
    lr, rewards = chosen_lr(None, tmp_path, [1, 3, 9], iterations=1, selection={}, steps=4)
    assert lr == 3 and set(rewards) == {"1", "3", "9"}


def test_methods_are_compared_at_equal_calls_in_words():
    row = {"prompts": "seen", "network_calls": 4, "judge_r1": 0.5, "judge_r1_spread": 0.01, "runs": 3}
    rows = {"ours": [row, row | {"network_calls": 8}], "base": [row | {"judge_r1": 0.4, "runs": 1}],
            "other": [row | {"network_calls": 2}]}  # fmt: skip
    words = against("ours", rows, seeds=3)
    assert words[0] == "ours, against base. Seen prompts, 4 calls: R@1 is 0.100 ± 0.023 higher, outside the noise."
    assert words[1].startswith("1 of 1 differences") and "Welch" in words[1] and len(words) == 2


def test_quick_has_all_that_the_full_study_has():
    assert {"speed-reward", "kl", "likelihood", "percentile", "low-quality", "group-size", "guidance", "trained-steps",
            "lr"} <= set(ablations())  # fmt: skip


def test_steps_that_are_chosen_stand_beside_the_best_mixture_of_given_ones_of_as_many_calls():
    assert pace.hull({4: 0.5, 5: 0.51, 6: 0.54, 7: 0.53, 8: 0.55}) == [4, 6, 8]
    assert pace.hull({4: 0.5, 5: 0.55, 6: 0.54}) == [4, 5]
    assert pace.mixture([4, 6, 8], 4.5) == {4: 0.75, 6: 0.25} and pace.mixture([4, 6, 8], 9.0) == {6: 0.0, 8: 1.0}
    hard, easy = torch.tensor([0.2, 0.2]), torch.tensor([0.6, 0.6])
    given = {n: torch.stack([torch.stack([hard + gain, easy]), torch.ones(2, 2), torch.full((2, 2), float(n))])
             for n, gain in ((4, 0.0), (5, 0.1), (6, 0.4))}  # fmt: skip
    auto = torch.stack([given[6][:, 0], given[4][:, 1]], 1)  # the hard prompt goes on, the easy one stops
    found = pace.compared({"auto": auto, **given})
    assert found["calls"] == 5 and found["quarters"][0] == 6 and found["correlation"] == pytest.approx(-1)
    assert found["gain"] == pytest.approx(0.6 - (0.4 + 0.6) / 2)
    assert found["gain_r1"] == pytest.approx(0)
