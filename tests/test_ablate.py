"""The machinery of ablations, with training and evaluation replaced by records of their calls."""

import json
from pathlib import Path

import pytest

import speedrl.ablate
from speedrl.ablate import ablate, variants
from speedrl.evaluate import METRICS


@pytest.fixture
def calls(monkeypatch):
    """What was trained; a run writes its model's folder, and its reward is that of its options."""
    trained = []

    def train(*, out, resume, **options):
        trained.append((out, resume, options))
        if options["steps_reward"] == options.get("lr"):
            raise RuntimeError("it fell over\nbadly")
        (out / "model").mkdir(parents=True)
        (out / "model" / "reward").write_text(str(options["steps_reward"] + options["seed"]))
        return out / "model"

    def evaluate(models, *, out, **options):
        (model,) = models
        reward = float((Path(model) / "reward").read_text()) if model != "embedded" else -1.0
        row = {"model": model, "prompts": "seen", "steps": 1, "guidance": 1.0, "temperature": 1.0, "network_calls": 1,
               "seconds_per_image": 0.5, "weights": "w", "settings": "s"}  # fmt: skip
        return [row | dict.fromkeys(METRICS) | {"reward": reward, **options}]

    monkeypatch.setattr(speedrl.ablate, "train", train)
    monkeypatch.setattr(speedrl.ablate, "evaluate", evaluate)
    return trained


def test_one_table_of_all_variants(calls, tmp_path, capsys):
    rows = ablate(out=tmp_path, seeds=(0, 1), iterations=3, evaluation={"steps": 2})
    assert [row["model"] for row in rows] == ["start", "without speed reward", "with speed reward"]
    assert [row["reward"] for row in rows] == [-1.0, 0.5, 1.0] and all(row["steps"] == 2 for row in rows)
    assert rows[0]["reward_spread"] is None and rows[1]["reward_spread"] == pytest.approx(0.5**0.5)
    assert len(calls) == 4 and all(options["iterations"] == 3 for _, _, options in calls)
    assert {options["seed"] for _, _, options in calls} == {0, 1}
    assert json.loads((tmp_path / "ablation.json").read_text())["rows"] == rows
    assert "| with speed reward |" in (tmp_path / "ablation.md").read_text()
    assert "with speed reward" in capsys.readouterr().out


def test_finished_runs_are_kept_interrupted_ones_go_on_and_others_are_refused(calls, tmp_path):
    ablate(out=tmp_path, iterations=3)
    run = tmp_path / "with-speed-reward" / "seed-0" / "run"
    (run / "model" / "reward").unlink()
    (run / "model").rmdir()
    (run / "checkpoints" / "000002").mkdir(parents=True)
    ablate(out=tmp_path, iterations=3)
    assert [(out, resume) for out, resume, _ in calls[2:]] == [(run, True)]
    with pytest.raises(ValueError, match="other options"):
        ablate(out=tmp_path, iterations=4)


def test_a_failing_variant_stops_no_other(calls, tmp_path, capsys):
    rows = ablate(out=tmp_path, lr=0.0)
    assert [row["model"] for row in rows] == ["start", "with speed reward"]
    written = json.loads((tmp_path / "ablation.json").read_text())
    assert written["failed"] == {"without speed reward, seed 0": "it fell over badly"}
    assert "it fell over badly" in capsys.readouterr().out


def test_bad_input(calls, tmp_path):
    with pytest.raises(ValueError, match="unknown ablation"):
        ablate("nothing", out=tmp_path)
    with pytest.raises(ValueError, match="sets steps_reward itself"):
        ablate(out=tmp_path, steps_reward=0.3)
    with pytest.raises(ValueError, match="no seed"):
        ablate(out=tmp_path, seeds=())
    assert all({"steps", "steps_reward"} == options.keys() for options in variants("speed-reward").values())
    assert not calls
