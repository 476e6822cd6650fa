"""Intervals over rows: exact where they can be, of the right width where they cannot, and paired."""

import numpy as np
import pytest

from peft_caft.resampled_ratios import Bootstrap

GENERATOR = np.random.default_rng(7)


def test_estimate_is_the_ratio_of_sums_and_not_the_mean_of_ratios():
    assert Bootstrap(2).ratio([1.0, 9.0], [1.0, 3.0]).estimate == 2.5


def test_width_is_that_of_the_standard_error():
    values = GENERATOR.normal(3.0, 2.0, size=400)
    interval = Bootstrap(400, resamples=4000).mean(values)
    error = values.std() / 20
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        interval = Bootstrap(60, resamples=300, level=0.9, seed=seed).mean(GENERATOR.normal(size=60))
        hits += interval.low <= 0 <= interval.high
    assert 165 <= hits <= 193  # of 200 at 90 %


def test_whole_rows_are_drawn():
    """100 tokens that are alike inside two rows say no more than two rows do."""
    interval = Bootstrap(2, resamples=200).ratio([0.0, 100.0], [50.0, 50.0])
    assert (interval.low, interval.estimate, interval.high) == (0.0, 1.0, 2.0)


def test_difference_is_paired():
    difficulty = GENERATOR.normal(0, 100, size=50)  # of the rows, far larger than the difference
    tokens = np.full(50, 10.0)
    found = Bootstrap(50).difference(difficulty, tokens, difficulty - 1, tokens)
    for value in (found.estimate, found.low, found.high):
        assert value == pytest.approx(-0.1)
    assert found.excludes_zero
    assert not Bootstrap(50).mean(difficulty).excludes_zero


def test_difference_of_other_denominators_is_that_of_the_ratios():
    found = Bootstrap(3).difference([1, 2, 3], [1, 1, 2], [4, 4, 4], [2, 2, 2])
    assert found.estimate == pytest.approx(2.0 - 1.5)
    assert found.low < found.estimate < found.high


def test_same_seed_same_interval_and_another_seed_another_one():
    values = GENERATOR.normal(size=30)
    first, again, other = (Bootstrap(30, seed=seed).mean(values) for seed in (1, 1, 2))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)


def test_rows_without_a_count_do_not_count():
    interval = Bootstrap(4).ratio([1.0, 3.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0])
    assert (interval.low, interval.estimate, interval.high) == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(("top", "bottom", "estimate"), [([0, 0], [0, 0], None), ([3, 0], [2, 0], 1.5)])
def test_no_interval_where_there_is_nothing_to_resample(top, bottom, estimate):
    interval = Bootstrap(2).ratio(top, bottom)
    assert (interval.estimate, interval.low, interval.high) == (estimate, None, None)
    assert not interval.excludes_zero


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"rows": 2, "resamples": 0}, {"rows": 2, "level": 1.0}])
def test_numbers_without_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="bootstrap: got rows="):
        Bootstrap(**wrong)


def test_values_of_other_rows_are_refused():
    with pytest.raises(ValueError, match=r"got values of shape \(2,\), expected one for each of 3 rows"):
        Bootstrap(3).mean([1.0, 2.0])
