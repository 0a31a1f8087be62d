"""The comparison that ends a training; figures of studies: what is averaged, and that files are whole and alike."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import experiments.before_after
import speedrl.evaluation.reports
from speedrl.evaluation.reports import report
from speedrl.studies.plots import look, over_iterations, over_stretches, plot_curves


def run(*values, metric="quality", first=1):
    return [{"iteration": i, metric: value} for i, value in enumerate(values, first)]


def test_curves_are_means_over_what_every_run_has_reached():
    iterations, means, widths = over_iterations([run(0.0, 1.0, 5.0), run(1.0, 2.0)], "quality")
    assert iterations == [1, 2] and means == [0.5, 1.5]
    assert widths == pytest.approx([12.706 * 0.5] * 2, rel=1e-4)
    assert over_iterations([run(0.5)], "quality") == ([1], [0.5], [None])
    assert over_iterations([run(0.5)], "kl") == over_iterations([], "kl") == ([], [], [])


def test_what_sets_runs_apart_is_paired_by_seed_and_averaged_over_stretches():
    steady = {0: run(0.0, 0.1, 0.2, 0.3), 1: run(1.0, 1.1, 1.2, 1.3)}  # seeds that differ by far more than variants do
    better = {0: run(0.1, 0.2, 0.4, 0.5, 0.9), 1: run(1.1, 1.2, 1.4, 1.5), 2: run(9.0, 9.0, 9.0, 9.0)}
    (first, first_apart, first_width), (second, second_apart, second_width) = over_stretches(
        better, steady, "quality", stretches=2
    )
    assert (first, second) == (1.5, 3.5)
    assert (first_apart, second_apart) == pytest.approx((0.1, 0.2))
    assert first_width < 0.01 and second_width < 0.01
    assert over_stretches({0: run(0.5)}, {0: run(0.1)}, "quality") == [(1.0, pytest.approx(0.4), None)]
    assert over_stretches(better, {7: run(0.0)}, "quality") == over_stretches(better, steady, "kl") == []


def test_no_two_lines_look_alike_without_colour():
    looks = [look(k) for k in range(65)]
    assert len({(one["marker"], one["linestyle"]) for one in looks}) == 65


def test_figures_are_written_as_png_and_svg_and_the_same_twice(tmp_path):
    variants = {"token": {0: run(0.1, 0.2), 1: run(0.2, 0.3)}, "sequence, one run": {0: run(0.1, 0.15)}, "none": {}}
    for folder in ("a", "b"):
        plot_curves(variants, tmp_path / folder / "curves", metrics={"quality": "quality", "kl": "KL"}, title="kl")
    assert (tmp_path / "a/curves.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "a/curves.svg").read_text(encoding="utf-8")
    assert svg == (tmp_path / "b/curves.svg").read_text(encoding="utf-8") and "</svg>" in svg
    assert not [path for path in (tmp_path / "a").iterdir() if "partial" in path.name]


@pytest.fixture
def trained(tiny_generator_folder, tmp_path, monkeypatch):
    """The tiny generator with other weights, without guidance, with searched scalars and a step policy for 2 steps."""
    monkeypatch.setattr(speedrl.evaluation.reports, "judge_if_there", lambda device, console: None)
    monkeypatch.setattr(
        speedrl.evaluation.reports, "load_qualities",
        lambda text, **_: ({"redness": lambda images, prompts: images[:, 0].mean((1, 2))}, {"redness": 1.0}),
    )
    folder = shutil.copytree(tiny_generator_folder, tmp_path / "trained")
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file

    save_file({name: 1.1 * value for name, value in load_file(path).items()}, path)
    tensors = {"search": torch.full((7, 4), 0.1), "steps.choices": torch.tensor([1, 2]),
               "steps.bias": torch.tensor([0.0, 9.0]), "steps.weight": torch.zeros(2, 32)}
    save_file(tensors, folder / "scheduler/sampler.safetensors")
    config = folder / "scheduler/scheduler_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"guidance_scale": 1.0, "remask_share": 0.5}
    config.write_text(json.dumps(settings), encoding="utf-8")
    return folder


def test_the_report_compares_like_with_like(trained, tiny_generator_folder, tmp_path, capsys):
    options = dict(out=tmp_path / "out", prompts=["a b", "c d"], some=2, images=2)
    rows = report(str(tiny_generator_folder), trained, **options)
    found = [(row["model"], row["steps"], row["network_evaluations"]) for row in rows]
    searched, after = "base, its sampler searched", "trained"
    assert found == [
        (searched, "auto", 2), (after, "auto", 2), (searched, 4, 4), (after, 4, 4), (searched, 8, 8), (after, 8, 8),
        ("base", 6, 12), (searched, 16, 16), (after, 16, 16),
    ]
    base, others = rows[6], rows[:6] + rows[7:]
    assert base["guidance"] == 3.0 and base["remask"] == 0.0
    assert all(row["guidance"] == 1.0 and row["remask"] == 0.5 for row in others)
    assert all(rows[i]["reward"] != rows[i + 1]["reward"] for i in (0, 2, 4))
    assert json.loads((tmp_path / "out/comparison.json").read_text(encoding="utf-8")) == rows
    assert (tmp_path / "out/before_after.png").stat().st_size > 1000
    assert "auto: 2 (2.0)" in capsys.readouterr().out


def test_the_front_pages_sheet_has_random_prompts_of_a_stated_seed(trained, tiny_generator_folder, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "sheet.png"
    prompts.write_text("\n".join(f"prompt {i}" for i in range(9)), encoding="utf-8")
    options = dict(model=str(trained), base=str(tiny_generator_folder), prompts=str(prompts), count=3)
    written = []
    for seed in (0, 0, 1):
        experiments.before_after.main(**options, seed=seed, out=out)
        written.append(out.read_bytes())
    assert written[0] == written[1] != written[2]
    assert "3 of 9 prompts, drawn at random with seed 1" in capsys.readouterr().out
    with Image.open(out) as sheet:
        assert sheet.width > 3 * 128 and sheet.height > 3 * 128


def test_a_count_that_all_prompts_take_is_compared_once(trained, tiny_generator_folder, tmp_path, capsys):
    path = trained / "scheduler/sampler.safetensors"
    save_file({"search": torch.zeros(7, 4), "steps.choices": torch.tensor([1, 4]),
               "steps.bias": torch.tensor([0.0, 9.0]), "steps.weight": torch.zeros(2, 32)}, path)
    options = dict(out=tmp_path / "out", prompts=["a b"], some=1, images=1)
    assert [row["steps"] for row in report(str(tiny_generator_folder), trained, **options)].count(4) == 0
    path.unlink()  # trained with one number of steps, 6 by its scheduler
    steps = [row["steps"] for row in report(str(tiny_generator_folder), trained, **options)]
    assert steps == [4, 4, 6, 6, 8, 8, 6, 16, 16]
