"""Medians of repeated measurements, how sure they are, and which of them stand out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
_SEED = 0
# The usual cut of the modified z-score (Iglewicz and Hoaglin, 1993).
_OUTLIER_SCORE = 3.5
# Makes the median absolute deviation of normal values their standard deviation.
_TO_DEVIATION = 1.4826
# Values closer together than this part of their median are never outliers: a clock has its own grain.
_GRAIN = 0.01


@dataclass(frozen=True)
class Summary:
    """Of the rounds' values: median, the ends of its 95 % confidence interval, extremes, and what stands out.

    Attributes:
        outliers: positions of the values far from the median. They are told, not dropped: a median bears them.
    """

    median: float
    low: float
    high: float
    minimum: float
    maximum: float
    outliers: tuple[int, ...] = ()

    @property
    def width(self) -> float:
        """Of the confidence interval, as a part of the median."""
        return (self.high - self.low) / self.median

    @property
    def includes_one(self) -> bool:
        """For ratios: whether "no difference" lies in the interval."""
        return self.low <= 1 <= self.high


def summarize(values: Sequence[float]) -> Summary:
    """Median with its interval (see :func:`bootstrap`), extremes and outliers."""
    low, high = bootstrap([values], lambda medians: medians[0])
    return Summary(statistics.median(values), low, high, min(values), max(values), find_outliers(values))


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """The confidence interval of ``median(above) / median(below)`` for measurements that are not paired."""
    return bootstrap([above, below], lambda medians: medians[0] / medians[1])


def bootstrap(
    groups: Sequence[Sequence[float]], statistic: Callable[[list[np.ndarray]], np.ndarray]
) -> tuple[float, float]:
    """The percentile bootstrap (Efron, 1979): 2000 resamples of each group, seed 0, so the same values give the same
    interval.

    Args:
        statistic: called with the groups' medians, an array [R] each; returns the statistic of every resample, [R].
    """
    random = np.random.default_rng(_SEED)
    medians = []
    for values in groups:
        array = np.asarray(values, dtype=np.float64)
        picks = random.integers(0, len(array), (RESAMPLES, len(array)))
        medians.append(np.median(array[picks], axis=1))
    found = statistic(medians)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def variation(values: Sequence[float]) -> float:
    """The spread of values as a part of their median: the median absolute deviation, scaled to a standard deviation."""
    middle = statistics.median(values)
    return _TO_DEVIATION * statistics.median(abs(value - middle) for value in values) / middle


def find_outliers(values: Sequence[float]) -> tuple[int, ...]:
    """Positions of the values more than 3.5 scaled median absolute deviations from the median (at least 3.5 %)."""
    middle = statistics.median(values)
    reach = _OUTLIER_SCORE * max(variation(values), _GRAIN) * middle
    return tuple(at for at, value in enumerate(values) if abs(value - middle) > reach)
