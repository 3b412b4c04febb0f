"""Which rate, method and allocation: the next trial follows from the results so far, so a search resumes by itself.

At the middle rate of the ladder every method is tried with the first allocation, then every other allocation with the
best method. With the best pair the ladder is halved until the highest rate within the bound is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Trial:
    """What is pruned and measured."""

    rate: float
    method: str
    allocation: str

    @property
    def name(self) -> str:
        """As a folder's name."""
        return f"{self.method}-{self.allocation}-{100 * self.rate:g}"


@dataclass(frozen=True)
class Space:
    """What can be tried.

    Attributes:
        rates: ascending.
        limit: the highest perplexity that is within the bound.
    """

    rates: Sequence[float]
    methods: Sequence[str]
    allocations: Sequence[str]
    limit: float

    @property
    def most_trials(self) -> int:
        """The most that a search takes."""
        return len(self.methods) + len(self.allocations) - 1 + math.ceil(math.log2(len(self.rates) + 1)) - 1

    @property
    def middle(self) -> float:
        return self.rates[len(self.rates) // 2]


def next_trial(space: Space, results: Mapping[Trial, float]) -> Trial | None:
    """What to try next; None when the search is over.

    Args:
        results: perplexities; infinity for a model that diverged or could not be pruned.
    """
    for method in space.methods:
        if (trial := Trial(space.middle, method, space.allocations[0])) not in results:
            return trial
    method = _lowest(space, results, space.allocations[:1])[0]
    for allocation in space.allocations:
        if (trial := Trial(space.middle, method, allocation)) not in results:
            return trial
    method, allocation = best_pair(space, results)
    low, high = _bracket(space, results, method, allocation)
    if high - low <= 1:
        return None
    return Trial(space.rates[(low + high) // 2], method, allocation)


def best_pair(space: Space, results: Mapping[Trial, float]) -> tuple[str, str]:
    """The method and allocation with the lowest perplexity at the middle rate."""
    return _lowest(space, results, space.allocations)


def chosen(space: Space, results: Mapping[Trial, float]) -> Trial | None:
    """The highest rate of the best pair that is within the bound; None where there is none yet."""
    if not results:
        return None
    method, allocation = best_pair(space, results)
    within = [
        trial
        for trial, value in results.items()
        if (trial.method, trial.allocation) == (method, allocation) and value <= space.limit
    ]
    return max(within, key=lambda trial: trial.rate, default=None)


def nearest(results: Mapping[Trial, float]) -> Trial:
    """The trial with the lowest perplexity."""
    return min(results, key=lambda trial: results[trial])


def _lowest(space: Space, results: Mapping[Trial, float], allocations: Sequence[str]) -> tuple[str, str]:
    found = {
        pair: results[trial]
        for pair in product(space.methods, allocations)
        if (trial := Trial(space.middle, *pair)) in results
    }
    return min(found, key=lambda pair: found[pair])


def _bracket(space: Space, results: Mapping[Trial, float], method: str, allocation: str) -> tuple[int, int]:
    """The highest place in the ladder that is known to be within the bound, and the lowest known not to be."""
    low, high = -1, len(space.rates)
    for at, rate in enumerate(space.rates):
        value = results.get(Trial(rate, method, allocation))
        if value is None:
            continue
        if value <= space.limit:
            low = max(low, at)
        else:
            high = min(high, at)
    return low, high
