"""Intervals over seeds: against scipy's own tests and a simulation, and what is said of many."""

import numpy as np
import pytest
from scipy import stats

from speedrl.studies.intervals import caution, interval, paired, t_quantile


def test_interval_is_scipys_and_covers_the_mean_as_often_as_it_says():
    values = [0.3, 0.5, 0.45, 0.7]
    mean, width = interval(values)
    found = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - width, mean + width) == pytest.approx((found.low, found.high))
    draws = np.random.default_rng(0).normal(1.0, 2.0, (2000, 3)).tolist()
    covered = np.mean([abs(mean - 1) <= width for mean, width in map(interval, draws)])
    assert covered == pytest.approx(0.95, abs=0.015)
    assert interval([0.4]) == (0.4, None)
    with pytest.raises(ValueError, match="no value"):
        interval([])


def test_paired_agrees_with_scipys_paired_t_test_at_the_border():
    a, b = {0: 0.61, 1: 0.52, 2: 0.70, 7: 9.0}, {0: 0.50, 1: 0.48, 2: 0.55, 5: 0.1}
    found = paired(a, b)
    other = stats.ttest_rel([0.61, 0.52, 0.70], [0.50, 0.48, 0.55])
    assert found["seeds"] == 3 and found["difference"] == pytest.approx(0.1)
    assert found["outside"] == (other.pvalue < 0.05)
    level = 1 - other.pvalue
    assert paired(a, b, level=level - 0.001)["outside"] and not paired(a, b, level=level + 0.001)["outside"]


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_quantiles_of_students_t_are_scipys(level):
    for freedom in (1, 2, 3, 4, 5, 9, 10, 100):
        assert t_quantile(level, freedom) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-9)


def test_what_is_the_same_for_all_variants_of_a_seed_cancels():
    noise = {seed: 10.0 * seed for seed in range(4)}
    found = paired({s: v + 0.1 + 0.001 * s for s, v in noise.items()}, noise)
    assert found["outside"] and found["interval"] < 0.01


def test_caution_counts_what_chance_would_give():
    one, two = paired({0: 0.1}, {0: 0.2}), paired({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.5})
    assert "nothing can be said" in caution([one])
    assert caution([two] * 20 + [one]).startswith("20 of 20 differences are outside the noise; 1.0 would be by chance")
