"""Trainings whose policy chooses its steps: what they learn, save and resume, and how their models are used."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from speedrl import cli
from speedrl.evaluation.measuring import columns_of, evaluate, plot, steps_taken
from speedrl.generation import draw, generate
from speedrl.method.schedules import step_range
from speedrl.models.checkpoint import chooses_steps, load_generator, save_generator
from speedrl.pace import Pace
from speedrl.run.exporting import export
from speedrl.training import draw_steps, train

PROMPTS = ["an owl", "a fox", "an elk", "a cat", "an owl", "a dog"]


def flat(images, prompts):
    """A quality that is the same whatever is drawn."""
    return torch.zeros(len(images))


def green(images, prompts):
    return images[:, 1].mean((1, 2))


def given(model, folder):
    (folder / "prompts.txt").write_text("a b\nc d\ne f\n", encoding="utf-8")
    return dict(model=str(model), prompts=str(folder / "prompts.txt"), quality="tests.test_auto:green", steps="auto:4",
                groups=2, group_size=4, compile=False, bf16=False, lr=3e-2, eps=1e-8, warmup=0)  # fmt: skip


@pytest.fixture
def options(tiny_generator_folder, tmp_path):
    return given(tiny_generator_folder, tmp_path)


@pytest.fixture(scope="module")
def run(tiny_generator_folder, tmp_path_factory):
    """A run of three iterations, with an average of its weights."""
    folder = tmp_path_factory.mktemp("auto")
    train(out=folder / "run", iterations=3, ema=0.5, trained=2, updates=2, steps_reward=0.3,
          **given(tiny_generator_folder, folder))  # fmt: skip
    return folder / "run"


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in lines]


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def same(one, other):
    held = [load_file(path) for path in (one, other)]
    return held[0].keys() == held[1].keys() and all(torch.equal(held[0][name], held[1][name]) for name in held[0])


def run_command(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def refused(*arguments):
    result = run_command(*arguments)
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize("likelihood", ["token", "sequence", "exact"])
def test_ratio_is_one_before_the_first_update_and_the_metrics_tell_the_steps(options, tmp_path, likelihood):
    train(out=tmp_path / "run", iterations=2, likelihood=likelihood, guidance=2.5, reference_guidance=2.5,
          micro_batch=3, steps_reward=0.3, **options | {"lr": 1e-2})  # fmt: skip
    first, second = metrics(tmp_path / "run")
    assert first["ratio_max"] == pytest.approx(1, abs=1e-5) and second["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert first["kl"] == pytest.approx(0, abs=1e-6) and first["grad_norm"] > 0
    assert first["steps_mean"] == 3 and second["steps_mean"] != 3, "two steps or four, at first as often"
    for row in (first, second):
        assert row["speed"] == pytest.approx(1 - row["steps_mean"] / 4)
        assert row["reward"] == pytest.approx(row["quality"] + 0.3 * row["speed"])


def test_the_speed_reward_makes_the_policy_choose_fewer_steps(options, tmp_path):
    options |= {"quality": "tests.test_auto:flat", "kl_weight": 0.0, "iterations": 12, "groups": 4, "group_size": 8}
    for name, reward in (("fast", 1.0), ("slow", -1.0)):
        train(out=tmp_path / name, steps_reward=reward, **options)
    (fast, slow), (one, other) = (
        [metrics(tmp_path / name)[i]["steps_mean"] for name in ("fast", "slow")] for i in (-1, 0)
    )
    assert one == other == 3 and fast < 2.5 and slow > 3.5


def test_the_model_gets_a_pace_of_its_own_and_the_rest_keeps_its_layout(run, tiny_generator_folder):
    assert files(run / "model") - files(tiny_generator_folder) >= {"pace/config.json", "pace/model.safetensors"}
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert load_file(run / "model" / weights).keys() == load_file(tiny_generator_folder / weights).keys()
    held = load_file(run / "checkpoints/000003/tensors.safetensors")
    for kind in ("transformer", "average", "optimizer.exp_avg"):
        assert held[f"{kind}.pace.out.weight"].shape == (1, 32) and held[f"{kind}.pace.out.bias"].abs().max() > 0
    generator = load_generator(run)
    assert generator.pace.most == 4 and chooses_steps(run) and not chooses_steps(tiny_generator_folder)
    assert torch.equal(generator.pace.out.weight, held["average.pace.out.weight"])
    assert generator.pace.out.weight.dtype == load_generator(run, dtype=torch.bfloat16).pace.out.weight.dtype


@pytest.mark.parametrize("more", [{"ema": 0.8, "updates": 2}, {"lora": 2, "merge": True}])
def test_a_resumed_run_is_the_uninterrupted_one_and_its_checkpoint_exports_as_it_saves(options, tmp_path, more):
    options |= {"lr": 1e-2} | more
    train(out=tmp_path / "whole", iterations=3, **options)
    train(out=tmp_path / "parts", iterations=2, **options)
    train(out=tmp_path / "parts", iterations=3, resume=True, **options)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    export(tmp_path / "parts", out=tmp_path / "exported")
    saved = {name for name in files(tmp_path / "whole") if name.endswith(".safetensors") and "checkpoints" not in name}
    assert {name.partition("/")[2] for name in saved} >= {"pace/model.safetensors"}
    for name in saved:
        assert same(tmp_path / "whole" / name, tmp_path / "parts" / name), name
        assert same(tmp_path / "whole" / name, tmp_path / "exported" / name), name


def test_an_adapter_keeps_the_pace_beside_it_and_a_training_of_given_steps_has_none(options, tmp_path):
    train(out=tmp_path / "run", iterations=2, lora=2, **options | {"lr": 1e-2})
    assert files(tmp_path / "run/adapter") >= {"pace/config.json", "pace/model.safetensors", "adapter_config.json"}
    generator = load_generator(tmp_path / "run")
    assert generator.pace.out.bias.abs().max() > 0 and chooses_steps(tmp_path / "run")
    fixed = options | {"model": str(tmp_path / "run"), "steps": "2"}
    train(out=tmp_path / "fixed", iterations=1, **fixed)
    assert load_generator(tmp_path / "fixed").pace is None and not (tmp_path / "fixed/model/pace").exists()
    train(out=tmp_path / "on", iterations=1, **fixed | {"steps": "auto:4"})
    moved = load_generator(tmp_path / "on").pace.out.bias - generator.pace.out.bias
    assert 0 < moved.abs().max() <= 0.21, "it goes on from the pace that was there"
    with pytest.raises(ValueError, match="chooses at most 4 steps, not 8: go on with --steps auto:4"):
        train(out=tmp_path / "other", iterations=1, **fixed | {"steps": "auto"})
    assert not (tmp_path / "other").exists()


def test_a_trained_model_chooses_unless_it_is_given_a_number(run, tiny_generator):
    generator = load_generator(run)
    tokens, steps = draw(generator, PROMPTS)
    again, same_steps = draw(generator, PROMPTS, steps="auto", batch=2)
    assert torch.equal(tokens, again) and torch.equal(steps, same_steps)
    assert set(steps.tolist()) <= {2, 4} and tokens.max() < generator.codes
    always = generator._replace(pace=Pace(32, 4))
    always.pace.out.bias.data.fill_(1.0)
    revised, taken = draw(always, PROMPTS)
    assert taken.tolist() == [4] * 6
    stopped, taken = draw(always, PROMPTS, steps="auto:3")  # a sweep takes two
    assert taken.tolist() == [2] * 6 and not torch.equal(stopped, revised)
    assert torch.equal(stopped, generate(always, PROMPTS, steps=2)), "as that many given steps are"
    assert draw(generator, PROMPTS, steps=3)[1].tolist() == [3] * 6
    assert torch.equal(generate(generator, PROMPTS, steps="3"), generate(generator, PROMPTS, steps=3))
    assert draw(tiny_generator, PROMPTS)[1].tolist() == [8] * 6
    beyond = "chooses from 2 to 4"
    for wrong, says in (("auto:5", beyond), ("auto:1", beyond), ("many", "1 to 16 or auto"), (0, "1 to 16")):
        with pytest.raises(ValueError, match=says):
            draw(generator, PROMPTS, steps=wrong)
    with pytest.raises(ValueError, match="does not choose its steps"):
        draw(tiny_generator, PROMPTS, steps="auto")
    with pytest.raises(ValueError, match="--revise above 0"):
        draw(generator, PROMPTS, revise=0.0)


def test_the_random_tokens_that_a_distilled_generator_starts_from_go_with_chosen_steps(tiny_generator):
    chooses = tiny_generator._replace(pace=Pace(32, 4), revise=0.5)
    torch.nn.init.normal_(chooses.pace.out.weight, generator=torch.Generator().manual_seed(0))
    generator = chooses._replace(random_share=0.4)
    tokens, steps = draw(generator, PROMPTS)
    assert tokens.max() < generator.codes and len(steps.unique()) > 1
    assert not torch.equal(tokens, draw(chooses, PROMPTS)[0])
    assert torch.equal(tokens, draw(generator, PROMPTS, batch=2)[0])


def test_the_commands(run, tiny_generator_folder, tmp_path):
    for steps in ((), ("--steps", "auto"), ("--steps", "auto:3"), ("--steps", 2)):
        assert run_command("sample", "an owl", "--model", run, "--out", tmp_path / "x.png", *steps).exit_code == 0
    plain = ("--model", tiny_generator_folder, "--steps", "auto")
    assert "does not choose its steps" in refused("sample", "an owl", *plain, "--out", tmp_path / "y.png")
    prompts = tmp_path / "p.txt"
    prompts.write_text("an owl\na fox\n", encoding="utf-8")
    both = ("--prompts", prompts, "--out", tmp_path / "eval", "--model", run)
    assert "does not choose its steps" in refused("eval", *both, *plain)
    assert not (tmp_path / "eval").exists() and not (tmp_path / "y.png").exists()
    assert "--steps" in refused("eval", *both, "--steps", "auto,x")
    assert "at least 1" in refused("train", "--steps", "auto:0", "--out", tmp_path / "run")
    assert "3 steps at the least" in refused("train", "--steps", "auto:2", "--out", tmp_path / "run")
    assert "--revise above 0" in refused("train", "--steps", "auto:4", "--revise", 0, "--out", tmp_path / "run")


@pytest.fixture
def nothing_judged(monkeypatch):
    monkeypatch.setattr("speedrl.evaluation.measuring.judge_if_there", lambda device, console: None)
    monkeypatch.setattr("speedrl.evaluation.reports.judge_if_there", lambda device, console: None)


def test_a_row_tells_the_calls_that_it_took(nothing_judged, run, tmp_path):
    options = dict(out=tmp_path, prompts=PROMPTS[:4], count=3, seeds=2, pictures=2, guidance=(1.0, 2.0))
    rows = evaluate([run], steps=("auto", 2), quality="tests.test_auto:green", **options)
    assert [row["steps"] for row in rows] == ["auto", 2, "auto", 2]
    for row, times in ((rows[0], 1), (rows[2], 2)):
        assert row["network_calls"] == times * row["steps_mean"] and 2 <= row["steps_mean"] <= 4
        assert len(row["steps_of_prompts"]) == 4 and row["steps_std"] >= 0
    generator, wanted = load_generator(run), [prompt for prompt in PROMPTS[:4] for _ in range(3)]
    took = torch.stack([draw(generator, wanted, steps="auto", guidance=1.0, seed=seed)[1] for seed in (0, 1)]).double()
    assert rows[0]["steps_mean"] == took.mean() and "steps_mean" not in rows[1]
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == rows
    assert evaluate([run], steps=("auto", 2), quality="tests.test_auto:green", **options) == rows, "kept"
    header, lines = columns_of(rows)
    assert lines[0][header.index("steps")] == "auto" and lines[1][header.index("calls")] == "2"
    assert lines[0][header.index("calls")] == f"{rows[0]['network_calls']:.1f}"
    plot(rows, tmp_path / "plot.png")


def test_the_spread_of_steps_is_over_prompts():
    taken = torch.tensor([[[1, 3], [4, 4]], [[2, 2], [4, 4]]])  # two seeds of two pictures of two prompts
    found = steps_taken(taken, 2.0)
    assert found["steps_mean"] == 3 and found["network_calls"] == 6
    assert found["steps_of_prompts"] == [2, 4] and found["steps_std"] == pytest.approx(2**0.5)
    assert steps_taken(taken[:, :1], 1.0)["steps_std"] is None


def test_the_comparison_has_the_model_as_it_chooses_and_at_as_many_steps(nothing_judged, options, run, tmp_path):
    from speedrl.evaluation.reports import report

    rows = report(options["model"], run, out=tmp_path, prompts=options["prompts"], quality=options["quality"], count=2,
                  seeds=1)  # fmt: skip
    own = [row for row in rows if row["model"] == str(run)]
    assert own[0]["steps"] == "auto" and own[0]["network_calls"] == own[0]["steps_mean"]
    few = own[1]["steps"]
    assert abs(few - own[0]["steps_mean"]) < 1.5 and [row["steps"] for row in rows].count(few) >= 3
    assert (tmp_path / "before_after.png").exists() and json.loads(
        (tmp_path / "comparison.json").read_text(encoding="utf-8")
    ) == rows


def test_a_damaged_pace_and_another_models_are_refused(run, tiny_generator, tmp_path):
    model = shutil.copytree(run / "model", tmp_path / "model")
    weights = model / "pace/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(ValueError, match="damaged or half written"):
        load_generator(model)
    save_generator(tiny_generator._replace(pace=Pace(16, 4)), tmp_path / "narrow")
    with pytest.raises(ValueError, match="takes 16 features, not 32"):
        load_generator(tmp_path / "narrow")
    (tmp_path / "narrow/pace/config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="describes no such model"):
        load_generator(tmp_path / "narrow")


def test_every_octave_of_a_range_of_step_counts_is_drawn_as_often():
    random = torch.Generator().manual_seed(0)
    for groups in (4, 8, 8, 8):
        counts = draw_steps(step_range("1-15"), groups, 2, random, shared=True)[::2]
        assert counts.float().log2().floor().long().bincount().tolist() == [groups // 4] * 4, "in every iteration"
    many = torch.cat([draw_steps(step_range("1-15"), 8, 1, random, shared=True) for _ in range(1000)])
    often = torch.tensor([(many == n).float().mean() for n in (2, 3)])
    torch.testing.assert_close(often, torch.tensor([1.5, 4 / 3]).log2() / 4, atol=0.02, rtol=0)
    assert (draw_steps(step_range("4"), 3, 2, torch.Generator(), shared=False) == 4).all()


def test_pictures_of_a_group_share_their_step_count_or_have_their_own(options, tmp_path, capsys):
    bounds = step_range("2-16")
    shared, own = (draw_steps(bounds, 50, 8, torch.Generator().manual_seed(0), shared=on) for on in (True, False))
    assert (shared.view(50, 8) == shared.view(50, 8)[:, :1]).all() and len(shared.unique()) > 10
    assert (own.view(50, 8) != own.view(50, 8)[:, :1]).any() and set(own.tolist()) == set(range(2, 17))
    options |= {"steps": "1-4", "steps_reward": 0.5, "credit": "rollout"}
    said = {}
    for name, more in (("shared", {}), ("own", {"shared_steps": False}), ("free", {"steps_reward": 0.0})):
        train(out=tmp_path / name, iterations=1, **options | more)
        said[name] = capsys.readouterr().out
    assert [name for name, text in said.items() if "speed reward cancels" in text] == ["shared"]
    for worth in (0.0, 0.2):
        train(out=tmp_path / f"auto-{worth}", iterations=1, **options | {"steps": "auto:4", "steps_reward": worth})
        assert ("steps cost nothing" in capsys.readouterr().out) == (worth == 0)
    rows = {name: metrics(tmp_path / name)[0] for name in said}
    assert rows["shared"]["reward"] > rows["free"]["reward"] + 0.05, "it is there, but in every group the same"
    assert rows["shared"]["grad_norm"] == pytest.approx(rows["free"]["grad_norm"], rel=1e-2)
    assert rows["own"]["grad_norm"] != pytest.approx(rows["shared"]["grad_norm"], rel=0.1)
    train(out=tmp_path / "step", iterations=1, **options | {"shared_steps": False, "credit": "step"})
    assert "speed reward cancels" in capsys.readouterr().out
    row = rows["own"]
    assert 1 < row["steps_mean"] < 4 and row["speed"] == pytest.approx(1 - row["steps_mean"] / 4)
