"""The machinery of ablations, with training and evaluation replaced by records of their calls, and once for real."""

import inspect
import json
import re
import sys
from pathlib import Path

import pytest

import speedrl.studies.ablations
import speedrl.studies.runs
from speedrl.evaluation.measuring import METRICS
from speedrl.studies.ablations import (
    AGAIN,
    OFFSET,
    ablate,
    all_ablations,
    compared,
    difference,
    differences_of,
    floors,
    is_result,
    over_runs,
)
from speedrl.studies.runs import command, commands_of, run_folder, side_by_side
from speedrl.system.options import options_of
from speedrl.training import train

SCORE = "def score(images, prompts):\n    return images.mean((1, 2, 3))\n"


@pytest.fixture
def calls(monkeypatch):
    """What was trained; a run writes its model's folder and metrics, and its reward is that of its options."""
    trained = []

    def train(*, out, resume, **options):
        trained.append((out, resume, options))
        if options.get("likelihood") == "sequence" and options.get("lr") == 0.5:
            raise RuntimeError("it fell over\nbadly")
        (out / "model").mkdir(parents=True)
        reward = len(options.get("likelihood", "token")) + options["seed"] % OFFSET
        (out / "model" / "reward").write_text(str(reward), encoding="utf-8")
        lines = [{"iteration": i + 1, "quality": reward + i, "kl": 0.1, "steps": 8} for i in range(3)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return out / "model"

    def evaluate(models, *, out, **options):
        model, *others = models
        trained = model not in ("embedded", "other")
        reward = float((Path(model) / "reward").read_text(encoding="utf-8")) if trained else -1.0
        row = {"model": model, "prompts": "training", "guidance": 1.0, "temperature": 1.0, "schedule": "cosine",
               "order": "random", "remask": 0.5, "seconds_per_image": 0.5, "reward_within": 0.1}
        row |= dict.fromkeys(METRICS) | {"reward": reward, "steps_mean": reward, "steps_mode": 4}
        rows = [row | {"steps": s, "network_evaluations": reward if s == "auto" else s} for s in options["steps"]]
        return rows + (evaluate(others, out=out, **options) if others else [])

    for module in (speedrl.studies.ablations, speedrl.studies.runs):
        monkeypatch.setattr(module, "evaluate", evaluate)
    monkeypatch.setattr(speedrl.studies.runs, "train", train)
    return trained


def test_one_report_of_all_variants(calls, tmp_path, capsys):
    rows = ablate("likelihood", out=tmp_path, seeds=(0, 1), iterations=3, eval_steps=(2,))
    names = ["token", AGAIN, "exact", "token, random order", "token, 4 updates", "sequence, 4 updates"]
    assert [(row["model"], row["steps"]) for row in rows] == [
        ("start", 2), *((name, steps) for name in names for steps in (2, "auto"))
    ]
    assert [row["reward"] for row in rows[1::2]] == [5.5, 5.5, 5.5, 5.5, 5.5, 8.5] and rows[0]["reward"] == -1
    assert rows[0]["reward_spread"] is None and rows[1]["reward_spread"] == pytest.approx(0.5**0.5)
    assert rows[1]["reward_interval"] == pytest.approx(12.706 * 0.5, rel=1e-4)  # t of one degree of freedom
    assert len(calls) == 12 and all(options["iterations"] == 3 for _, _, options in calls)
    written = json.loads((tmp_path / "report-likelihood/likelihood.json").read_text(encoding="utf-8"))
    assert [row["model"] for row in written["rows"]] == [row["model"] for row in rows]
    varied = {"likelihood", "order", "updates"}
    seeds = sorted(options["seed"] for _, _, options in calls if not varied & options.keys())
    assert seeds == [0, 1, OFFSET, OFFSET + 1], "the baseline's pair"
    found = {(d["variant"], d["steps"], d["metric"]): d for d in written["differences"]}
    longer = found["sequence, 4 updates", 2, "reward"]
    assert longer["difference"] == 3 and longer["outside"] and found["exact", 2, "reward"]["difference"] == 0
    assert found["sequence, 4 updates", "auto", "network_evaluations"]["difference"] == 3
    assert ("sequence, 4 updates", 2, "network_evaluations") not in found
    text = (tmp_path / "report-likelihood/likelihood.md").read_text(encoding="utf-8")
    assert "| sequence, 4 updates | training | 2 | +3.000 ±0.000 * |" in text and "* is a result" in text
    assert "| sequence, 4 updates |" in text and "speedrl train --out" in text and "--likelihood sequence" in text
    assert "(likelihood.png)" in text
    for name in ("likelihood.png", "likelihood.svg"):
        assert (tmp_path / "report-likelihood" / name).stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "sequence" in shown and "report-likelihood/likelihood.md in 0 minutes" in shown


def test_ablations_share_the_runs_that_they_have_in_common(calls, tmp_path):
    rows = ablate(out=tmp_path, seeds=(0,))
    assert {row["ablation"] for row in rows} == set(all_ablations())
    folders = [f"{out.parent.parent.name}/{out.parent.name}" for out, _, _ in calls]
    assert {"default/seed-0", f"default/seed-{OFFSET}"} <= set(folders) and len(set(folders)) == len(folders)
    ablate("kl", out=tmp_path, seeds=(0,))
    assert len(calls) == len(folders), "a run is the same whichever ablation asks for it"
    page = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "Seeds 0." in page
    for name in all_ablations():
        assert f"- [{name}]({name}.md)\n" in page and (tmp_path / f"report/{name}.md").exists()


def test_every_variant_sets_options_that_train_has_and_the_first_is_the_default():
    known = inspect.signature(train).parameters
    speed = dict.fromkeys(("speed-reward", "likelihood", "method"), {"steps_reward": 4.0})
    for name, variants_of in all_ablations().items():
        (_, first), (second, again), *others = variants_of.items()
        assert second == AGAIN and again == first and others
        assert all(own.keys() <= known.keys() for own in variants_of.values())
        assert all(own for _, own in others)
        assert difference(first, {}) == speed.get(name, {}), name
    assert difference({"lr": 1e-4, "kl": "ce"}, {"lr": 1e-4}) == {}
    assert run_folder(Path("x"), {"kl_weight": 0.1, "steps": "1-8"}, 3) == Path("x/runs/kl-weight-0.1_steps-1-8/seed-3")


def test_every_variant_is_a_setting_that_training_accepts():
    from speedrl.run.settings import check_settings

    for name, variants_of in all_ablations().items():
        for own in variants_of.values():
            settings = check_settings(train, train.__kwdefaults__ | own)
            assert settings["groups"] * settings["group_size"] == 128, name


def test_the_help_of_the_command_names_every_ablation():
    _, opt = options_of(ablate)["name"]
    assert set(re.findall(r"[\w-]+", opt.help)) - {"or"} == {*all_ablations(), "all"}


def test_models_beside_the_variants_are_measured_as_the_start_is(calls, tmp_path):
    rows = ablate("method", out=tmp_path, seeds=(0,), eval_steps=(2,), beside=["other"])
    assert [row["model"] for row in rows][:3] == ["start", "other", "GRPO"]
    given = {options.get("quality", "embedded"): options.get("steps_reward") for _, _, options in calls}
    assert given == {"embedded": 4.0, "none": None}, "no reward has no speed reward either"


def test_finished_runs_are_kept_interrupted_ones_go_on_and_others_are_refused(calls, tmp_path):
    ablate("likelihood", out=tmp_path, seeds=(0,), iterations=3)
    folder = tmp_path / "runs/likelihood-sequence_steps-reward-4.0_updates-4/seed-0"
    (folder / "done").unlink()
    (folder / "run/model/reward").unlink()
    (folder / "run/model").rmdir()
    (folder / "run/checkpoints/000002").mkdir(parents=True)
    ablate("likelihood", out=tmp_path, seeds=(0,), iterations=3)
    assert [(out, resume) for out, resume, _ in calls[6:]] == [(folder / "run", True)]
    with pytest.raises(ValueError, match=r"other options \(`iterations` 3, now 4\)"):
        ablate("likelihood", out=tmp_path, seeds=(0,), iterations=4)


def test_a_finished_run_is_measured_again_only_where_other_options_ask_for_it(calls, tmp_path, monkeypatch):
    measured, one = [], speedrl.studies.runs.evaluate

    def counted(models, **options):
        measured.append(options["steps"])
        return one(models, **options)

    monkeypatch.setattr(speedrl.studies.runs, "evaluate", counted)
    first = ablate("likelihood", out=tmp_path, seeds=(0,), eval_steps=(2,))
    assert ablate("likelihood", out=tmp_path, seeds=(0,), eval_steps=(2,)) == first and len(measured) == 6
    ablate("likelihood", out=tmp_path, seeds=(0,), eval_steps=(4,))
    assert measured[6:] == [(4, "auto")] * 6
    folder = tmp_path / "runs/likelihood-sequence_steps-reward-4.0_updates-4/seed-0"
    (folder / "done").unlink()
    (folder / "run/model/reward").unlink()
    (folder / "run/model").rmdir()
    ablate("likelihood", out=tmp_path, seeds=(0,), eval_steps=(4,))
    assert len(measured) == 13, "a model that was trained anew is measured anew"


def test_a_failing_variant_stops_no_other(calls, tmp_path, capsys):
    rows = ablate("likelihood", out=tmp_path, seeds=(0,), lr=0.5)
    names = {"token", AGAIN, "exact", "token, random order", "token, 4 updates"}
    assert {row["model"] for row in rows} == {"start"} | names
    written = json.loads((tmp_path / "report-likelihood/likelihood.json").read_text(encoding="utf-8"))
    assert written["failed"] == {"sequence, 4 updates, seed 0": "it fell over badly"}
    assert "it fell over badly" in capsys.readouterr().out
    page = (tmp_path / "report-likelihood/likelihood.md").read_text(encoding="utf-8")
    assert "Failed: sequence, 4 updates, seed 0: it fell over badly" in page


def test_bad_input(calls, tmp_path):
    with pytest.raises(ValueError, match="unknown ablation 'nothing': choose speed-reward"):
        ablate("nothing", out=tmp_path)
    with pytest.raises(ValueError, match="sets `likelihood` itself"):
        ablate("likelihood", out=tmp_path, likelihood="exact")
    with pytest.raises(ValueError, match="`seeds` takes values with commas"):
        ablate("kl", out=tmp_path, seeds=())
    with pytest.raises(ValueError, match="`jobs` must be at least 1"):
        ablate("kl", out=tmp_path, jobs=0)
    assert not calls and not any(tmp_path.iterdir())


def test_differences_are_paired_by_seed_at_equal_settings():
    def row(steps, nfe, value):
        return {"prompts": "training", "steps": steps, "network_evaluations": nfe, "judge_r1": value}

    measured = {
        "a": {0: [row(4, 4, 0.5)], 1: [row(4, 4, 0.7)], 2: [row(4, 4, 0.9)]},
        "b": {0: [row(4, 8, 9.0), row(4, 4, 0.6)], 1: [row(4, 8, 9.0), row(4, 4, 0.79)]},
    }
    (found,) = compared("b", "a", measured)
    assert found["seeds"] == 2 and found["difference"] == pytest.approx(0.095) and found["network_evaluations"] == 4
    assert found["interval"] == pytest.approx(12.706 * 0.005, rel=1e-4) and found["outside"]
    assert differences_of([found]) == (
        ["variant", "prompts", "steps", "R@1"],
        [["b", "training", "4", "+0.095 ±0.064 *"]],
    )


def test_a_difference_no_larger_than_that_of_identical_arms_is_no_result():
    one = {"variant": "b", "prompts": "training", "steps": 4, "network_evaluations": 8, "metric": "reward",
           "difference": 0.1, "interval": 0.05, "outside": True}
    pair = one | {"variant": AGAIN, "difference": -0.1}
    assert is_result(one, floors([])) and not is_result(one, floors([pair]))
    assert differences_of([pair, one])[1][1] == ["b", "training", "4, 8 NFE", "+0.100 ±0.050"]


def test_a_metric_that_no_run_has_has_no_interval():
    row = {"model": "m", "prompts": "given", "steps": 1, "guidance": 1.0, "temperature": 1.0,
           "network_evaluations": 1, "seconds_per_image": 1.0, "reward": 0.5, "judge_r1": None}
    (found,) = over_runs("v", [[row], [row | {"reward": 0.7}]])
    assert found["reward"] == pytest.approx(0.6) and found["runs"] == 2 and "judge_r1_interval" not in found


def test_the_command_of_a_run_is_one_that_the_command_line_takes():
    from typer.main import get_command

    from speedrl.cli import app

    options = {"kl": "k3", "train_steps": None, "compile": False, "model": "embedded", "seed": 2, "lr": 1e-4}
    lines = commands_of(Path("runs/a b"), options, {"steps": (4, 8), "count": 2, "seeds": 1, "images": 0})
    assert "--steps 4,8,auto" in lines[1]
    assert lines[0].startswith("speedrl train --out 'runs/a b/run' --kl k3 --no-compile")
    import shlex

    for line in lines:
        _, name, *flags = shlex.split(line)
        get_command(app).get_command(None, name).make_context(name, flags)
    assert (
        command("train", {"reward_weights": ["a=1", "b=2"]})
        == "speedrl train --reward-weights a=1 --reward-weights b=2"
    )


@pytest.fixture
def tiny(tiny_generator_folder, tmp_path, monkeypatch):
    """Options of a real training of the tiny generator, its own reward and no judge."""
    (tmp_path / "prompts.txt").write_text("a b\nc d\n", encoding="utf-8")
    (tmp_path / "brightness.py").write_text(SCORE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return {"model": str(tiny_generator_folder), "prompts": str(tmp_path / "prompts.txt"), "iterations": 1, "groups": 1,
            "group_size": 2, "steps": "2", "quality": "brightness:score", "compile": False, "seed": 0,
            "search": 0}


def test_processes_side_by_side_do_their_runs_and_one_that_fails_stops_no_other(tiny, tmp_path):
    from rich.console import Console

    runs = {tmp_path / "good/seed-0": tiny, tmp_path / "bad/seed-0": tiny | {"lr": -1.0}}
    evaluation = {"steps": (1,), "count": 1, "seeds": 1, "images": 0, "guidance": (1.0,), "prompts": tiny["prompts"],
                  "quality": tiny["quality"]}
    found = side_by_side(runs, evaluation=evaluation, devices=["cpu"], jobs=2, console=Console())
    (row,) = found[tmp_path / "good/seed-0"]
    assert row["steps"] == 1 and row["reward"] > 0
    assert found[tmp_path / "bad/seed-0"] == "`lr` must be above 0, got -1"
    assert "Traceback" in (tmp_path / "bad/seed-0/log.txt").read_text(encoding="utf-8")
    assert (tmp_path / "good/seed-0/run/model/transformer").exists()


def test_a_process_that_dies_is_reported(tmp_path, monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = side_by_side({tmp_path / "x/seed-0": {}}, evaluation={}, devices=["cpu"], jobs=2, console=Console())
    assert "ended with status 1" in found[tmp_path / "x/seed-0"]
