"""Medians, their intervals, and what stands out."""

from __future__ import annotations

import numpy as np
import pytest

from sparsedeploy.speed.intervals import find_outliers, ratio_interval, summarize, variation


def test_summary() -> None:
    summary = summarize([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (summary.median, summary.minimum, summary.maximum) == (3.0, 1.0, 5.0)
    assert 1.0 <= summary.low < 3.0 < summary.high <= 5.0
    assert summary.width == pytest.approx((summary.high - summary.low) / 3)
    assert not summary.includes_one or summary.low == 1.0
    assert (summarize([7.0]).low, summarize([7.0]).high, summarize([7.0]).outliers) == (7.0, 7.0, ())


def test_same_values_give_the_same_interval() -> None:
    values = np.random.default_rng(3).lognormal(size=15).tolist()
    assert summarize(values) == summarize(values)


def test_interval_holds_the_true_median_as_often_as_it_says() -> None:
    """Of 300 samples of 20 normal values around 10; the percentile bootstrap of a median is close to 95 %."""
    random = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        summary = summarize(random.normal(10, 1, 20).tolist())
        held += summary.low <= 10 <= summary.high
    assert 0.90 <= held / 300 <= 0.99


def test_ratio_of_two_samples() -> None:
    random = np.random.default_rng(2)
    slow, fast = random.normal(12, 0.1, 20).tolist(), random.normal(10, 0.1, 20).tolist()
    low, high = ratio_interval(slow, fast)
    assert 1.15 < low < 1.2 < high < 1.25
    low, high = ratio_interval(fast, fast)
    assert low <= 1 <= high


def test_outliers_are_those_far_from_the_median() -> None:
    assert find_outliers([10, 10.1, 9.9, 10.2, 9.8, 30]) == (5,)
    assert find_outliers([10, 10.1, 9.9, 10.2, 9.8]) == ()
    # A spread of nothing does not make every small step an outlier.
    assert find_outliers([10, 10, 10, 10, 10.2]) == ()
    assert find_outliers([10, 10, 10, 10, 11]) == (4,)


def test_variation_of_normal_values_is_their_deviation() -> None:
    values = np.random.default_rng(0).normal(100, 5, 4000).tolist()
    assert variation(values) == pytest.approx(0.05, rel=0.05)
