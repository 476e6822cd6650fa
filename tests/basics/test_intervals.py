"""Intervals against hand-computed and analytic cases."""

import math

import numpy as np
import pytest

from peft_caft.basics.intervals import mean_estimate, mean_over_seeds, paired_difference, wilson_interval


def test_mean_is_over_defined_values_and_weighed():
    estimate = mean_estimate([0.5, None, 2.0, 3.5], weights=[1, 100, 2, 1])
    assert estimate.mean == pytest.approx((0.5 + 4.0 + 3.5) / 4)
    assert estimate.rows == 3


def test_interval_is_that_of_the_normal_distribution_where_there_are_many_rows():
    values = np.random.default_rng(1).normal(3.0, 2.0, 4000)
    estimate = mean_estimate(list(values), resamples=4000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_weighed_interval_is_that_of_the_ratio_of_sums():
    rng = np.random.default_rng(2)
    weights, noise = rng.integers(1, 30, 3000), rng.normal(0, 1, 3000)
    values = 2 + noise / np.sqrt(weights)  # a mean over `weights` tokens
    estimate = mean_estimate(list(values), list(weights), resamples=4000)
    residuals = weights * (values - estimate.mean)
    half = 1.96 * np.sqrt((residuals**2).sum()) / weights.sum()  # the delta method
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.1)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"), [(0, 164, 0.0, 0.0229), (10, 20, 0.2993, 0.7007), (164, 164, 0.9771, 1.0)]
)
def test_shares_have_wilsons_interval(successes, n, low, high):
    """At 0 of n its upper end is z^2 / (n + z^2)."""
    estimate = mean_estimate([1.0] * successes + [0.0] * (n - successes))
    assert (estimate.low, estimate.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert estimate.method == "wilson"
    assert wilson_interval(0, n)[1] == pytest.approx(1.959964**2 / (n + 1.959964**2))


def test_one_run_has_the_interval_of_its_rows():
    assert mean_over_seeds([[1.0] * 20]) == mean_estimate([1.0] * 20)
    assert mean_over_seeds([[1.0] * 20]).method == "wilson"
    assert mean_over_seeds([[1.0] * 20] * 2).method == "bootstrap"


def test_same_values_give_the_same_interval_and_other_seeds_others():
    values = [0.1, 0.7, 0.4, 0.9, 0.3]
    assert mean_estimate(values) == mean_estimate(values)
    assert mean_estimate(values) != mean_estimate(values, seed=1)


def test_nothing_is_said_without_values_and_no_interval_of_one():
    assert mean_estimate([None, None]) is None
    assert paired_difference([[None, 1.0]], [[1.0, None]]) is None
    estimate = mean_estimate([0.25, None])
    assert (estimate.mean, estimate.low, estimate.high) == (0.25, None, None)


def test_pairs_take_out_what_rows_have_in_common():
    rng = np.random.default_rng(3)
    hard = rng.normal(0, 10, 500)  # rows differ much more than the runs do
    first, second = hard + rng.normal(0, 0.1, 500), hard + 0.05 + rng.normal(0, 0.1, 500)
    estimate = paired_difference([list(first)], [list(second)])
    assert estimate.mean == pytest.approx((second - first).mean())
    assert estimate.low > 0
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * (second - first).std() / math.sqrt(500), rel=0.1)


def test_pair_counts_where_both_are_defined():
    estimate = paired_difference([[1.0, None, 3.0, 5.0]], [[2.0, 9.0, None, 7.0]])
    assert estimate.mean == pytest.approx(1.5)
    assert estimate.rows == 2


def test_seeds_that_differ_widen_the_interval_as_their_variance_says():
    """Differences a seed has on all rows alike: only draws of seeds move the mean, with variance (S - 1) / S of the unbiased one."""
    of_seeds = np.array([-0.3, 0.0, 0.1, 0.4, 0.8, 1.0])
    first = np.zeros((6, 50))
    estimate = paired_difference(first.tolist(), (first + of_seeds[:, None]).tolist(), resamples=8000)
    assert estimate.mean == pytest.approx(of_seeds.mean())
    draws = np.array([np.random.default_rng(i).choice(of_seeds, 6).mean() for i in range(4000)])
    assert estimate.low == pytest.approx(np.quantile(draws, 0.025), abs=0.03)
    assert estimate.high == pytest.approx(np.quantile(draws, 0.975), abs=0.03)
    agreeing = paired_difference(first.tolist(), (first + 0.3).tolist())
    assert agreeing.low == pytest.approx(0.3)
    assert agreeing.high == pytest.approx(0.3)


def test_interval_covers_the_truth_as_often_as_it_says():
    """Mean of an exponential distribution, 60 rows: 95 % intervals of percentiles are known to cover about 92 to 94 %."""
    rng = np.random.default_rng(4)
    runs = [mean_estimate(list(rng.exponential(1.0, 60)), resamples=400) for _ in range(300)]
    covered = sum(run.low <= 1.0 <= run.high for run in runs) / len(runs)
    assert 0.88 <= covered <= 0.98


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="first and second"):
        paired_difference([[1.0, 2.0]], [[1.0]])
    with pytest.raises(ValueError, match="weights"):
        mean_estimate([1.0, 2.0], [1.0])
