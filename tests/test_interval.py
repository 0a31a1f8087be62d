"""Intervals over seeds: against scipy's own tests and a simulation, and the words that follow from them."""

import numpy as np
import pytest
from scipy import stats

from experiments.study.comparing import welch
from speedrl.studies.intervals import caution, half_width, interval, paired, say


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


def test_welch_agrees_with_scipys():
    a, b = [0.61, 0.52, 0.70], [0.50, 0.42, 0.55, 0.41]
    other = stats.ttest_ind(a, b, equal_var=False)
    low, high = other.confidence_interval(0.95)
    moments = [(np.mean(x), np.std(x, ddof=1), len(x)) for x in (a, b)]
    found = welch(*moments[0], other=moments[1])
    assert (found["difference"] - found["interval"], found["difference"] + found["interval"]) == pytest.approx(
        (low, high)
    )
    assert found["outside"] == (other.pvalue < 0.05) and found["seeds"] == 3
    assert welch(0.5, None, 1, other=moments[1])["outside"] is None
    assert half_width(0.1, 1) is None and half_width(np.std(a, ddof=1), 3) == pytest.approx(interval(a)[1])


def test_what_is_the_same_for_all_variants_of_a_seed_cancels():
    noise = {seed: 10.0 * seed for seed in range(4)}
    found = paired({s: v + 0.1 + 0.001 * s for s, v in noise.items()}, noise)
    assert found["outside"] and found["interval"] < 0.01


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.5}, "R@1 is 0.100 ± 0.000 higher, outside the noise"),
        ({0: 0.1, 1: 0.6}, {0: 0.4, 1: 0.5}, "R@1 is 0.100 ± 2.541 lower, within the noise"),
        ({0: 0.1}, {0: 0.4}, "R@1 is 0.300 lower, from one seed, which says nothing of noise"),
        ({0: 0.4, 1: 0.5}, {0: 0.4, 1: 0.5}, "R@1 is the same in every seed"),
    ],
)
def test_words_follow_from_the_numbers(a, b, words):
    assert say("R@1", paired(a, b)) == words


def test_caution_counts_what_chance_would_give():
    one, two = paired({0: 0.1}, {0: 0.2}), paired({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.5})
    assert "nothing can be said" in caution([one])
    assert caution([two] * 20 + [one]).startswith("20 of 20 differences are outside the noise; 1.0 would be by chance")
