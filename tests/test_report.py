"""Figures of runs and studies: what is averaged, and that files are whole, alike and free of the network."""

import pytest

from speedrl.evaluation.reports import look, over_iterations, over_stretches, plot_curves, plot_pareto


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
    row = {"network_calls": 4, "seconds_per_image": 0.1, "judge_r1": 0.5, "diversity": 0.4, "judge_r1_interval": 0.05}
    methods = {"base": [row, row | {"network_calls": 8, "judge_r1": 0.6}], "one step": [row | {"diversity": None}]}
    for folder in ("a", "b"):
        plot_curves(variants, tmp_path / folder / "curves", metrics={"quality": "quality", "kl": "KL"}, title="kl")
        plot_pareto(methods, tmp_path / folder / "pareto", real={"judge_r1": 0.62})
    for name in ("curves", "pareto"):
        assert (tmp_path / f"a/{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (tmp_path / f"a/{name}.svg").read_text(encoding="utf-8")
        assert svg == (tmp_path / f"b/{name}.svg").read_text(encoding="utf-8") and "</svg>" in svg
    assert not [path for path in (tmp_path / "a").iterdir() if "partial" in path.name]
