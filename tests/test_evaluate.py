"""Evaluation on a tiny random generator: what a row says, of which models, and what is told of the reward."""

import json
import shutil

import pytest
import torch

import speedrl.evaluation.measuring
from speedrl.evaluation.attributes import COLOURS
from speedrl.evaluation.judging import Judge
from speedrl.evaluation.measuring import (
    columns_of,
    evaluate,
    evaluations,
    has_step_policy,
    markdown,
    measure,
    plot,
    prompt_sets,
    separation,
    separations,
    table,
)
from speedrl.models.loading import load_generator

PROMPTS = ["a dog", "a cat", "nothing of note"]


def redness(images, prompts):
    assert len(images) == len(prompts)
    return images[:, 0].mean((1, 2))


@pytest.fixture
def judge(monkeypatch):
    """A judge whose features are the image's mean colour, of three concepts: red, green and blue."""
    made = Judge(
        torch.nn.Identity(), ["dog", "cat", "bird"], frozenset({"bird"}), torch.full((3,), 0.5), torch.eye(3),
        torch.eye(3)[:, :2], {"training": torch.zeros(2)}, {"training": torch.eye(2)},
        {"training": {"judge_r1": 0.6}},
    )
    monkeypatch.setattr(speedrl.evaluation.measuring, "features", lambda judge, images: images.mean((2, 3)))
    monkeypatch.setattr(speedrl.evaluation.measuring, "load_judge", lambda device: made)
    monkeypatch.setattr(
        speedrl.evaluation.measuring, "load_qualities", lambda text, **_: ({"redness": redness}, {"redness": 1.0})
    )
    return made


def kept(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def flat(*colours):
    return torch.tensor(colours, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 8, 8)


def test_measure(judge):
    red, green = flat((1, 0, 0)), flat((0, 1, 0))
    images = torch.stack([torch.cat([red, red]), torch.cat([green, red]), torch.cat([red, green])])
    found = measure(judge, {"redness": redness}, images, PROMPTS)
    assert found["judge_r1"] == 0.75  # the third prompt names nothing
    assert found["judge_margin"] > 0
    assert found["judge_r5"] == 1 and found["reward"] == pytest.approx(4 / 6)
    assert found["pixel_diversity"] == pytest.approx((2 / 3) ** 0.5 * 2 / 3)
    assert found["frechet"] > 0 and found["diversity"] > 0
    assert measure(judge, {"redness": redness}, images, PROMPTS, which="given")["frechet"] is None
    nameless = measure(judge, {}, images[:1, :1], PROMPTS[2:])
    assert all(value is None for value in nameless.values())
    assert found["reward_within"] == pytest.approx((2 / 3 * 0.5) ** 0.5)  # variances 0, 1/2 and 1/2
    bare = measure(None, {"redness": redness}, images, PROMPTS)
    assert bare["reward"] is not None and bare["judge_r1"] is None and bare["diversity"] is None
    with pytest.raises(ValueError, match="3 prompts"):
        measure(judge, {"redness": redness}, images, PROMPTS[:2])


def test_attributes_are_measured_of_images_of_64_pixels_whose_prompts_name_a_concept(judge):
    blue = torch.tensor(COLOURS["blue"])[:, None, None].expand(1, 1, 3, 64, 64) / 255
    ground, other = "a dog on a blue background", "a cat on a red background"
    assert measure(judge, {}, blue, [ground])["ground"] == 1 and measure(judge, {}, blue, [other])["ground"] == 0
    both = measure(judge, {}, torch.cat([blue, blue]), [ground, "a tree on a red background"])
    assert both["ground"] == 1 and both["size"] is None and both["place"] is None
    assert measure(judge, {}, blue[..., :32, :32], [ground])["ground"] is None
    assert measure(judge, {}, blue, ["a tree on a blue background"])["ground"] is None


def test_rows_and_files(judge, tiny_generator_folder, tmp_path, capsys):
    out = tmp_path / "[red] run"  # no markup
    options = dict(out=out, prompts=PROMPTS, held_out=["a bird"], count=2, seeds=2, images=2, batch=4)
    rows = evaluate([tiny_generator_folder], steps=(1, 2), **options)
    assert len(rows) == 2 * 2 * 2  # steps, guidance 3 and 1, prompts
    assert {row["prompts"] for row in rows} == {"given", "given held-out"}
    for row in rows:
        assert row["network_evaluations"] == row["steps"] * (2 if row["guidance"] == 3 else 1)
        assert row["temperature"] == 1.5 and row["seconds_per_image"] > 0
        assert row["reward"] is not None and row["reward_spread"] is not None
    assert kept(out) == rows
    for name in ("images.png", "quality_against_nfe.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "R@1" in shown and f"in {out}\n" in shown and "d' of reward, " in shown
    assert len(columns_of(rows)[1]) == markdown(rows).count("\n") - 2 == 8


def test_an_edited_reward_file_gives_other_rows(tiny_generator_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speedrl.evaluation.measuring, "judge_if_there", lambda device, console: None)
    mine = tmp_path / "mine.py"
    options = dict(out=tmp_path / "out", prompts=PROMPTS, steps=(2,), count=1, seeds=1, images=0, guidance=(1.0,))
    found = []
    for channel in (0, 1):
        code = f"def score(images, prompts):\n    return images[:, {channel}].mean((1, 2))\n"
        mine.write_text(code, encoding="utf-8")
        found += evaluate([tiny_generator_folder], quality=f"{mine}:score", **options)
        assert kept(tmp_path / "out") == found[-1:]
    assert found[0]["reward"] != found[1]["reward"]
    assert found[0]["pixel_diversity"] == found[1]["pixel_diversity"], "of the same images"


def test_models_may_be_generators(judge, tiny_generator, tiny_generator_folder, tmp_path, capsys):
    options = dict(out=tmp_path, prompts=PROMPTS, steps=(2,), count=1, seeds=1, images=2, guidance=(1.0,))
    rows = evaluate([tiny_generator, str(tiny_generator_folder), tiny_generator], **options)
    assert [row["model"] for row in rows] == ["generator 1", str(tiny_generator_folder), "generator 2"]
    assert rows[0]["reward"] == rows[1]["reward"] == rows[2]["reward"]
    assert evaluate(tiny_generator, **options)[0]["reward"] == rows[0]["reward"]
    with pytest.raises(ValueError, match="generator 1 was not"):
        evaluate([tiny_generator], **options | {"steps": ("auto",)})


def test_separation_is_the_difference_over_the_deviation_within_prompts():
    few, many = {"reward": 0.2, "reward_within": 0.3}, {"reward": 0.9, "reward_within": 0.4}
    assert separation(few, many) == pytest.approx(0.7 / (0.125**0.5))
    assert separation(many, few) == -separation(few, many)
    assert separation(few, {"reward": 0.9}) is None and separation(few | {"reward_within": 0.0}, few) > -1e-9
    assert separation(few | {"reward_within": 0.0}, many | {"reward_within": 0.0}) is None
    other = {"other": 0.1, "other_within": 1.0}
    assert separation(other, other | {"other": 0.6}, quality="other") == 0.5


def test_a_reward_that_hardly_sees_few_steps_is_told_with_a_warning():
    how = {"prompts": "training", "guidance": 1.0, "temperature": 1.0, "schedule": "cosine", "order": "confidence",
           "remask": 0.0, "reward_within": 0.1}

    def rows(*values, model="m"):
        return [how | {"model": model, "steps": s, "reward": value} for s, value in values]

    clear = separations(rows((8, 0.6), (1, 0.1), (4, 0.55), ("auto", 0.3)))
    assert clear == ["d' of reward, m, training prompts, guidance 1: 1 to 4 steps 4.50, 4 to 8 steps 0.50, "
                     "1 to 8 steps 5.00"]
    blind = separations([*rows((1, 0.50), (2, 0.54)), *rows((1, 0.1), (2, 0.9), model="other")])
    assert [line.split(":")[0] for line in blind] == [
        "d' of reward, m, training prompts, guidance 1", "warning", "d' of reward, other, training prompts, guidance 1"
    ]
    assert "1 from 2 steps (d' 0.40, below 0.5)" in blind[1]
    assert separations(rows((4, 0.5))) == [] == separations(rows((1, 0.1), (2, 0.9)), qualities=["none"])


def test_shares_to_remask_are_rows_of_their_own(judge, tiny_generator_folder, tmp_path, capsys):
    options = dict(out=tmp_path, steps=(4, 8), prompts=PROMPTS, count=1, seeds=1, images=2, guidance=(1.0,))
    rows = evaluate([tiny_generator_folder], remask=(0.0, 0.5), **options)
    assert [(row["remask"], row["steps"], row["network_evaluations"]) for row in rows] == [
        (0.0, 4, 4), (0.0, 8, 8), (0.5, 4, 4), (0.5, 8, 8)
    ]
    assert rows[0]["reward"] == rows[2]["reward"] and rows[1]["reward"] != rows[3]["reward"]
    header, lines = columns_of(rows)
    assert "schedule" not in header and [line[header.index("remask")] for line in lines] == ["0", "0", "0.5", "0.5"]


def test_orders_and_schedules_are_rows_of_their_own(judge, tiny_generator_folder, tmp_path, capsys):
    options = dict(out=tmp_path, steps=(3,), prompts=PROMPTS, count=1, seeds=1, images=0, guidance=(1.0,))
    rows = evaluate([tiny_generator_folder], schedule=("cosine", "square"), order=("random", "halton"), **options)
    assert [(row["schedule"], row["order"]) for row in rows] == [
        ("cosine", "random"), ("cosine", "halton"), ("square", "random"), ("square", "halton")
    ]
    assert len({row["reward"] for row in rows}) == 4
    (own,) = evaluate([tiny_generator_folder], **options)
    assert (own["schedule"], own["order"], own["remask"]) == ("cosine", "confidence", 0.0)
    assert "| halton |" in markdown(rows) and "| confidence |" not in markdown([own])
    for wrong, says in (
        ({"order": ("best",)}, "'best'"),
        ({"schedule": ("cubic",)}, "'cubic'"),
        ({"remask": (2.0,)}, "2.0"),
        ({"guidance": (0.5,)}, "`guidance` must be at least 1"),
        ({"temperature": (-1.0,)}, "`temperature` must be finite and not negative"),
    ):
        with pytest.raises(ValueError, match=says):
            evaluate([tiny_generator_folder], **options | wrong)


def test_same_seed_same_row(judge, tiny_generator_folder, tmp_path):
    options = dict(steps=(2,), prompts=PROMPTS, count=2, seeds=2, images=0, guidance=(1.0,))
    (first,) = evaluate([tiny_generator_folder], out=tmp_path / "a", **options)
    (second,) = evaluate([tiny_generator_folder], out=tmp_path / "b", batch=5, **options)
    for metric in ("reward", "judge_r1", "pixel_diversity"):
        assert first[metric] == pytest.approx(second[metric], abs=1e-4)


def test_bad_input(judge, tiny_generator_folder, tmp_path):
    with pytest.raises(ValueError, match="no model"):
        evaluate([], out=tmp_path)
    with pytest.raises(ValueError, match="`steps` must be numbers from 1 on"):
        evaluate([tiny_generator_folder], out=tmp_path, steps=(4, 0))
    with pytest.raises(ValueError, match="no prompt"):
        evaluate([tiny_generator_folder], out=tmp_path, prompts=[" "])
    with pytest.raises(ValueError, match="`count` must be at least 1"):
        evaluate([tiny_generator_folder], out=tmp_path, prompts=PROMPTS, count=0)
    with pytest.raises(FileNotFoundError):
        evaluate([tmp_path / "absent"], out=tmp_path, prompts=PROMPTS)


def test_sets_and_calls(tmp_path):
    (tmp_path / "p.txt").write_text("a dog\n\na cat\n", encoding="utf-8")
    assert prompt_sets(tmp_path / "p.txt", None) == {"given": ["a dog", "a cat"]}
    assert list(prompt_sets(["x"], ["y"])) == ["given", "given held-out"]
    assert evaluations(8, 1) == 8 and evaluations(8, 1.5) == 16


def test_plot_of_many_curves(tmp_path):
    rows = [
        {"model": f"runs/{m}", "prompts": which, "steps": s, "guidance": 1.0, "temperature": t,
         "schedule": "cosine", "order": "random", "remask": 0.0, "network_evaluations": s, "seconds_per_image": 0.1,
         "reward": s / 9, "reward_spread": 0.01, "judge_r1": None}
        for m in range(6) for which in ("training", "held-out") for s in (1, 2, 4) for t in (0.5, 2.0)
    ]
    assert plot(rows, tmp_path / "plot.png", real={"training": {"reward": 0.4}})
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert not plot([row | {"reward": None} for row in rows], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.fixture
def with_steps(tiny_generator_folder, tmp_path):
    """The tiny generator with a step policy that takes 4 steps for whatever the prompt."""
    from safetensors.torch import save_file

    folder = shutil.copytree(tiny_generator_folder, tmp_path / "with-steps")
    tensors = {"steps.choices": torch.tensor([1, 2, 4]), "steps.bias": torch.tensor([0.0, 0.0, 9.0]),
               "steps.weight": torch.zeros(3, 32)}
    save_file(tensors, folder / "scheduler/sampler.safetensors")
    return folder


def test_auto_steps_are_those_of_the_step_policy(judge, with_steps, tiny_generator_folder, tmp_path, capsys):
    assert has_step_policy(with_steps) and not has_step_policy(tiny_generator_folder)
    options = dict(out=tmp_path, prompts=PROMPTS, count=1, seeds=1, images=2)
    auto, fixed = evaluate([with_steps], steps=("auto", 4), guidance=(3.0,), **options)
    assert (auto["network_evaluations"], auto["steps_mean"], auto["steps_mode"]) == (8, 4, 4)
    assert auto["reward"] == fixed["reward"] and "auto: 4 (4.0)" in markdown([auto])
    assert has_step_policy(load_generator(with_steps))
    with pytest.raises(ValueError, match="`steps` auto is for models that were trained with a range"):
        evaluate([with_steps, tiny_generator_folder], steps=("auto",), **options)


@pytest.mark.parametrize("width", [60, 80, 100, 140, 200])
def test_a_table_fits_its_width_and_keeps_what_matters(width):
    from rich.console import Console

    row = {"model": "runs/a-name-that-is-rather-long/model", "prompts": "held-out", "steps": 16, "guidance": 1.0,
           "temperature": 2.0, "schedule": "cosine", "order": "confidence", "remask": 0.5, "network_evaluations": 16,
           "seconds_per_image": 0.123} | {name: 0.5 for name in speedrl.evaluation.measuring.METRICS}
    rows = [row | {"reward_spread": 0.01}, row | {"order": "halton"}]
    console = Console(width=width, record=True)
    console.print(table(rows, width=width))
    lines = console.export_text().splitlines()
    assert len(lines) == 3 and all(len(line) <= width for line in lines), "no cell is broken into lines"
    assert all(title in lines[0] for title in ("steps", "NFE", "reward", "R@1"))
    assert ("pixel diversity" in lines[0]) == (width == 200)
