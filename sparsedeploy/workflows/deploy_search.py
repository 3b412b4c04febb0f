"""Which rate, method and allocation: the next trial follows from the results so far, so a search resumes by itself.

At the middle rate of the ladder all methods and allocations were compared from one calibration. With the best pair the
ladder is halved until the highest rate within the bound is known. What the comparison says of the middle rate decides
on which side to begin; a bound of the answer is only what was pruned. Allocations that search by pruning are pruned at
the middle rate with the best method, beside the best pair. With a recovery, the rates above the answer are pruned and
trained one after the other, until one is outside of the bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

Pair = tuple[str, str]


@dataclass(frozen=True)
class Trial:
    """What is pruned and measured.

    Attributes:
        recovery: the method that trains what was pruned; None for none.
    """

    rate: float
    method: str
    allocation: str
    recovery: str | None = None

    @property
    def name(self) -> str:
        """As a folder's name."""
        return "-".join([self.method, self.allocation, f"{100 * self.rate:g}", *filter(None, [self.recovery])])

    @property
    def how(self) -> str:
        """For people, without the rate."""
        return ", ".join(filter(None, [self.method, self.allocation, self.recovery]))


@dataclass(frozen=True)
class Space:
    """What can be tried.

    Attributes:
        rates: ascending.
        limit: the highest perplexity that is within the bound.
        searching: those of the allocations that prune to make a plan.
        recovery: what trains the rates above the highest one that is within the bound without training.
    """

    rates: Sequence[float]
    methods: Sequence[str]
    allocations: Sequence[str]
    limit: float
    searching: Sequence[str] = ()
    recovery: str | None = None

    @property
    def spread(self) -> list[str]:
        """The allocations that are compared from one calibration."""
        return [name for name in self.allocations if name not in self.searching] or ["uniform"]

    @property
    def pairs(self) -> list[Pair]:
        """The methods with these allocations."""
        return list(product(self.methods, self.spread))

    @property
    def halvings(self) -> int:
        """The most rates of a pair that are pruned, unless the comparison errs about the middle one."""
        return math.ceil(math.log2(len(self.rates) + 1))

    @property
    def middle(self) -> float:
        return self.rates[len(self.rates) // 2]

    def firsts(self, pair: Pair) -> list[Trial]:
        """What is pruned at the middle rate, when ``pair`` is the best one of the comparison."""
        names = [pair[1]] if pair[1] in self.allocations else []
        return [Trial(self.middle, pair[0], name) for name in (*names, *self.searching)]


def next_trial(space: Space, compared: Mapping[Pair, float], results: Mapping[Trial, float]) -> Trial | None:
    """What to try next; None when the search is over.

    Args:
        compared: the perplexities of the pairs; a single pair needs none.
        results: of trials; infinity for a model that diverged or could not be pruned.
    """
    if space.searching:
        for trial in space.firsts(_best_compared(space, compared)):
            if trial not in results:
                return trial
    pair = best_pair(space, compared, results)
    known = {trial.rate: value for trial, value in results.items() if trial == Trial(trial.rate, *pair)}
    guessed = {space.middle: compared[pair]} if pair in compared else {}
    low, high = _bracket(space, {**guessed, **known})
    if high - low > 1:
        return Trial(space.rates[(low + high) // 2], *pair)
    for at in (low, high):  # what was only guessed
        if 0 <= at < len(space.rates) and space.rates[at] not in known:
            return Trial(space.rates[at], *pair)
    for rate in space.rates[low + 1 :] if space.recovery else ():
        trial = Trial(rate, *pair, space.recovery)
        if trial not in results:
            return trial
        if results[trial] > space.limit:
            break
    return None


def best_pair(space: Space, compared: Mapping[Pair, float], results: Mapping[Trial, float]) -> Pair:
    """The method and allocation with the lowest perplexity at the middle rate."""
    pruned = [trial for trial in results if trial.rate == space.middle and trial.recovery is None]
    if not (space.searching and pruned):
        return _best_compared(space, compared)
    best = min(pruned, key=lambda trial: results[trial])
    return best.method, best.allocation


def chosen(space: Space, compared: Mapping[Pair, float], results: Mapping[Trial, float]) -> Trial | None:
    """The highest rate of the best pair that is within the bound; None where there is none yet."""
    pair = best_pair(space, compared, results)
    within = [
        trial for trial, value in results.items() if (trial.method, trial.allocation) == pair and value <= space.limit
    ]
    return max(within, key=lambda trial: trial.rate, default=None)


def nearest(results: Mapping[Trial, float]) -> Trial:
    """The trial with the lowest perplexity."""
    return min(results, key=lambda trial: results[trial])


def _best_compared(space: Space, compared: Mapping[Pair, float]) -> Pair:
    return min(space.pairs, key=lambda pair: compared.get(pair, math.inf))


def _bracket(space: Space, known: Mapping[float, float]) -> tuple[int, int]:
    """The highest place in the ladder whose rate is within the bound, and the lowest that is not.

    Args:
        known: rate -> perplexity.
    """
    low, high = -1, len(space.rates)
    for at, rate in enumerate(space.rates):
        if rate not in known:
            continue
        if known[rate] <= space.limit:
            low = max(low, at)
        else:
            high = min(high, at)
    return low, high
