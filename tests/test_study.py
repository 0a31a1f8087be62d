"""The study on a tiny generator: it runs, keeps what is finished, and says what it did."""

import json
import re

import pytest
from typer.testing import CliRunner

import speedrl.evaluation.measuring
from experiments.study import __main__ as study
from experiments.study.__main__ import against, chosen_lr


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
    score = "def score(images, prompts):\n    return images.mean((1, 2, 3))\n"
    (tmp_path / "brightness.py").write_text(score, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--quick", "--base", tiny_generator_folder, "--out", tmp_path / "out", "--quality", "brightness:score",
               "--prompts", tmp_path / "prompts.txt", "--eval-prompts", tmp_path / "prompts.txt", "--steps", "2-4",
               "--lrs", "1e-3"]
    assert app(*options).exit_code == 0
    report = tmp_path / "out/report"
    found = json.loads((report / "study.json").read_text(encoding="utf-8"))
    assert not found["failed"]
    methods = {row["model"] for row in found["rows"]}
    trained = {"reinforcement learning", "fine-tuning", "one-step distillation"}
    assert methods == trained | {"base", "base, own settings", "base, searched sampler"}
    nfe = {name: {row["network_evaluations"] for row in found["rows"] if row["model"] == name} for name in methods}
    assert nfe["base"] == nfe["base, searched sampler"] == nfe["reinforcement learning"] == {4}, "with guidance"
    assert (nfe["base, own settings"], nfe["fine-tuning"], nfe["one-step distillation"]) == ({12}, {1, 4}, {1})
    assert all(row["reward_interval"] is not None for row in found["rows"])
    assert set(found["picked"]) == trained
    assert all(found["budgets"][name]["images"] == 8 for name in ("fine-tuning", "one-step distillation"))
    assert any(line.startswith("python -m experiments.alternatives.distil --out") for line in
               found["commands"]["one-step distillation"])
    page = (report / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:", page) and "outside the noise" in page
    for name in ("pareto-given.png", "pareto-given.svg", "equal_evaluations.png", "study.md"):
        assert (report / name).stat().st_size > 500

    def refuse(*_, **__):
        raise AssertionError("what is finished is kept")

    for name in ("finetune", "distil", "trained_once", "search_sampler"):
        monkeypatch.setattr(study, name, refuse)
    monkeypatch.setattr(speedrl.evaluation.measuring, "one_cell", refuse)
    assert app(*options).exit_code == 0
    others = ["2-3" if option == "2-4" else option for option in options]
    assert app(*others).exit_code == 0
    failed = json.loads((report / "study.json").read_text(encoding="utf-8"))["failed"]
    assert set(failed) == trained - {"one-step distillation"}
    assert all("holds a run of other options" in why for why in failed.values())


def test_learning_rates_are_chosen_by_the_reward(monkeypatch, tmp_path):
    def evaluate(models, **_):
        return [{"reward": {"1": 0.1, "3": 0.4, "9": 0.2}[models[0]]}]

    monkeypatch.setattr(study, "evaluate", evaluate)
    monkeypatch.setattr(study, "trained", lambda method, folder, *, lr, **_: f"{lr:g}")
    lr, rewards = chosen_lr(None, tmp_path, [1, 3, 9], iterations=1, selection={}, settings={"steps": (4,)})
    assert lr == 3 and rewards == {"1": 0.1, "3": 0.4, "9": 0.2}


def test_methods_are_compared_at_equal_evaluations_in_words():
    row = {"prompts": "training", "network_evaluations": 4, "judge_r1": 0.5, "judge_r1_spread": 0.01, "runs": 3}
    rows = {"ours": [row, row | {"network_evaluations": 8}], "base": [row | {"judge_r1": 0.4, "runs": 1}],
            "other": [row | {"network_evaluations": 2}]}
    words = against("ours", rows, seeds=3)
    assert words[0] == "ours, against base. Training prompts, 4 NFE: R@1 is 0.100 ± 0.023 higher, outside the noise."
    assert words[1].startswith("1 of 1 differences") and "Welch" in words[1] and len(words) == 2
