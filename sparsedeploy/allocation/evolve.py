"""EvoPress: rates found by evolution over a database of pruned levels (Sieberling et al., ICML 2025, arXiv
2410.14649, algorithm 1).

This is the search alone, over vectors of levels with a fixed budget; the caller scores them.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsedeploy import progress
from sparsedeploy.allocation.auto import SearchedElsewhere, SearchOptions
from sparsedeploy.errors import UserError
from sparsedeploy.options import option, seed_option
from sparsedeploy.registry import ALLOCATORS

Levels = tuple[int, ...]
# (levels, windows to measure on) -> divergence from the dense model; not finite where the pruned one has diverged.
Fitness = Callable[[Levels, range], float]
# By module, what a level down and a level up are expected to change the divergence by; NaN where there is no level.
Slopes = Sequence[tuple[float, float]]
# A mutation switches levels so many times: the smaller of two draws, as in the paper.
_SWITCHES = 3
# Where a mutation finds nothing to switch, it is drawn again so often.
_DRAWS = 100
# Of the modules that a guided mutant could move, the share that it leaves alone: no two are the same.
_LEFT_OUT = 0.3


@dataclass(frozen=True)
class EvolveOptions(SearchOptions):
    """The levels, the generations, and what plans are compared on."""

    step: float = option(0.05, "Distance between the rates of the database.", above=0, at_most=0.5)
    spread: float = option(0.25, "How far the database's rates reach below and above the target.", above=0, below=1)
    highest: float = option(0.95, "The highest rate of the database.", above=0, below=1)
    generations: int = option(50, "Maximum number of generations.", at_least=1)
    offspring: int = option(16, "Mutants per generation; a quarter of them survive each stage.", at_least=1)
    patience: int = option(15, "Stop after this many generations without an improvement; 0 runs them all.", at_least=0)
    guided: bool = option(
        True, "Half of the mutants follow the divergence's gradient; off: all are random, as in the paper."
    )
    seed: int = seed_option("Seed of the mutations.")


@ALLOCATORS.register("evolve", EvolveOptions, needs="hessian", strength=None, searches=True)
class Evolve(SearchedElsewhere):
    """Rates of single modules by evolution, starting from every other allocation's plan (Sieberling et al. 2024)."""


@dataclass(frozen=True)
class Space:
    """The vectors of levels that meet a budget.

    Attributes:
        removed: by module, the weights that each of its levels removes, rising.
        wanted: the weights to remove; a vector removes at least so many, by less than the largest step more.
        groups: sets of modules that mutations move together, besides single modules (layers, kinds of projections).
    """

    removed: tuple[tuple[int, ...], ...]
    wanted: int
    groups: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        least, most = (sum(levels[end] for levels in self.removed) for end in (0, -1))
        if not least <= self.wanted <= most:
            raise UserError(
                "no levels of the database meet the budget",
                "Choose another sparsity, or more levels: the allocation options spread and highest.",
            )

    @property
    def slack(self) -> int:
        """The largest step of any level."""
        steps = (after - before for levels in self.removed for before, after in itertools.pairwise(levels))
        return max(steps, default=1)

    def surplus(self, levels: Sequence[int]) -> int:
        """By how much a vector removes more than wanted."""
        return sum(table[at] for table, at in zip(self.removed, levels, strict=True)) - self.wanted

    def holds(self, levels: Sequence[int]) -> bool:
        return 0 <= self.surplus(levels) < self.slack

    def nearest(self, removed: Sequence[int], rng: random.Random) -> Levels:
        """The vector of the budget near these weights removed by module."""
        levels = [
            min(range(len(table)), key=lambda at: (abs(table[at] - wish), at))
            for table, wish in zip(self.removed, removed, strict=True)
        ]
        return self.repaired(levels, range(len(levels)), rng)

    def repaired(self, levels: list[int], movable: Sequence[int], rng: random.Random) -> Levels:
        """Move modules by single levels, in random order, until the budget is met."""
        order = list(movable)
        rng.shuffle(order)
        surplus = self.surplus(levels)
        while surplus < 0:
            up = [unit for unit in order if levels[unit] + 1 < len(self.removed[unit])] or [
                unit for unit, at in enumerate(levels) if at + 1 < len(self.removed[unit])
            ]
            surplus = self._move(levels, up[0], 1, surplus)
            order = _rotated(order, up[0])
        while surplus >= self.slack:
            fitting = [unit for unit in order if 0 < self._down(levels, unit) <= surplus] or [
                unit for unit in range(len(levels)) if 0 < self._down(levels, unit) <= surplus
            ]
            surplus = self._move(levels, fitting[0], -1, surplus)
            order = _rotated(order, fitting[0])
        return tuple(levels)

    def mutated(self, levels: Levels, rng: random.Random) -> Levels:
        """A vector of the same budget: some modules a level up or down, others the other way to make up for it."""
        moved = list(levels)
        units = [*((unit,) for unit in range(len(levels))), *self.groups]
        for _ in range(min(rng.randint(1, _SWITCHES), rng.randint(1, _SWITCHES))):
            pool = self.groups if self.groups and rng.random() < 0.5 else units
            first, second = rng.choice(pool), rng.choice(pool)
            direction = rng.choice((-1, 1))
            for unit in first:
                if 0 <= moved[unit] + direction < len(self.removed[unit]):
                    moved[unit] += direction
            others = [unit for unit in second if unit not in first] or [
                unit for unit in range(len(levels)) if unit not in first
            ]
            moved = list(self.repaired(moved, others, rng))
        return tuple(moved)

    def guided(self, levels: Levels, slopes: Slopes, rng: random.Random) -> Levels:
        """A vector of the same budget: some modules a level down where that should help most for its weights.

        For each of them others go a level up where it should cost least, as long as that costs less than it helps.
        How many go down is drawn, and so is which modules stay as they are.
        """
        downs: deque[tuple[float, int]] = deque()
        ups: deque[tuple[float, int]] = deque()
        for unit, (down, up) in enumerate(slopes):
            if rng.random() < _LEFT_OUT:
                continue
            if math.isfinite(down):
                downs.append((down / self._step(levels, unit, -1), unit))
            if math.isfinite(up):
                ups.append((up / self._step(levels, unit, 1), unit))
        downs, ups = deque(sorted(downs)), deque(sorted(ups))
        moved, surplus, left = list(levels), self.surplus(levels), 2 ** rng.randint(0, len(levels).bit_length() - 1)
        moves: set[int] = set()
        while left and downs and ups and downs[0][0] + ups[0][0] < 0:
            down, up = downs[0][1], ups[0][1]
            if down in moves:
                downs.popleft()
            elif up in moves or up == down:
                ups.popleft()
            elif (step := self._step(levels, down, -1)) <= surplus:
                moved[down], surplus, left = moved[down] - 1, surplus - step, left - 1
                moves.add(down)
            else:
                moved[up], surplus = moved[up] + 1, surplus + self._step(levels, up, 1)
                moves.add(up)
        return self.repaired(moved, range(len(levels)), rng)

    def _step(self, levels: Sequence[int], unit: int, by: int) -> int:
        """The weights between a module's level and the next one; 1 where there is none."""
        table, at = self.removed[unit], levels[unit]
        return abs(table[at + by] - table[at]) if 0 <= at + by < len(table) else 1

    def _down(self, levels: Sequence[int], unit: int) -> int:
        """What a level down gives back; 0 for the lowest."""
        at = levels[unit]
        return self.removed[unit][at] - self.removed[unit][at - 1] if at else 0

    def _move(self, levels: list[int], unit: int, by: int, surplus: int) -> int:
        table, at = self.removed[unit], levels[unit]
        levels[unit] = at + by
        return surplus + table[at + by] - table[at]


def _rotated(order: list[int], unit: int) -> list[int]:
    """The order with that unit at its end, so that each has its turn."""
    return [*(other for other in order if other != unit), *([unit] if unit in order else [])]


def stages(offspring: int, windows: int) -> list[tuple[int, int]]:
    """(vectors, windows) of each stage: a quarter of the vectors survives, on four times the windows, until all."""
    counts = [offspring]
    while counts[-1] > 1 and len(counts) < 4:
        counts.append(max(1, counts[-1] // 4))
    return [(count, max(1, windows // 4 ** (len(counts) - 1 - at))) for at, count in enumerate(counts)]


@dataclass(frozen=True)
class Generation:
    """The parent after a generation, enough to go on from it."""

    number: int
    levels: Levels
    fitness: float
    since_better: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "generation": self.number,
            "levels": list(self.levels),
            "fitness": self.fitness,
            "since_better": self.since_better,
        }

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Generation:
        return Generation(value["generation"], tuple(value["levels"]), value["fitness"], value["since_better"])


def evolve(
    space: Space,
    starts: Iterable[Levels],
    fitness: Fitness,
    *,
    windows: int,
    options: EvolveOptions,
    slopes: Callable[[Levels], Slopes | None] = lambda levels: None,
    resumed: Generation | None = None,
    record: Callable[[Generation], None] = lambda generation: None,
) -> Generation:
    """The best vector of levels that was found; on all windows it is never worse than any start.

    Each generation's mutants are measured on few windows, the survivors on more, the last one on all; it replaces its
    parent when it is better there. What a generation draws depends on its number alone, so a resumed search is the
    same search.

    Args:
        starts: vectors of the budget; not read when resumed.
        windows: how many there are.
        slopes: what half of the mutants follow; asked for once for each parent.
        resumed: the last generation of an interrupted search.
        record: called with every finished generation; the starts are number 0.

    Raises:
        UserError: every start has diverged.
    """
    everything = range(windows)
    if resumed is None:
        scored = [(_finite(fitness(levels, everything)), levels) for levels in dict.fromkeys(starts)]
        best, parent = min(scored, default=(math.inf, ()))
        if not math.isfinite(best):
            raise UserError("every plan that the search starts from has diverged", "Lower the sparsity.")
        resumed = Generation(0, parent, best, 0)
        record(resumed)
    state = resumed
    guide: tuple[Levels, Slopes | None] = ((), None)
    with progress.bar("evolve", options.generations, "generations") as advance:
        advance(state.number, f"best KL {state.fitness:.4f}")
        while state.number < options.generations and not 0 < options.patience <= state.since_better:
            number = state.number + 1
            rng = random.Random(f"{options.seed} {number}")
            if guide[0] != state.levels:
                guide = state.levels, slopes(state.levels) if options.guided else None
            mutants = _mutants(space, state.levels, guide[1], options.offspring, rng)
            first = rng.randrange(windows)
            score = math.inf
            for count, width in stages(options.offspring, windows):
                mutants = mutants[:count]
                # Few windows are other ones each time, so that the search does not settle on them.
                some = everything if width >= windows else range(first % (windows - width + 1), windows)[:width]
                with progress.hidden():
                    ranked = sorted((_finite(fitness(levels, some)), levels) for levels in mutants)
                score, mutants = (ranked[0][0] if ranked else math.inf), [levels for _, levels in ranked]
            better = score < state.fitness
            state = Generation(
                number,
                mutants[0] if better else state.levels,
                score if better else state.fitness,
                0 if better else state.since_better + 1,
            )
            record(state)
            advance(1, f"best KL {state.fitness:.4f}")
    return state


def _mutants(space: Space, parent: Levels, slopes: Slopes | None, count: int, rng: random.Random) -> list[Levels]:
    """Different mutants, at most ``count``: small spaces have fewer. Every other one follows the slopes."""
    found: dict[Levels, None] = {}
    for draw in range(_DRAWS * count):
        if len(found) == count:
            break
        mutant = space.guided(parent, slopes, rng) if slopes and draw % 2 == 0 else space.mutated(parent, rng)
        if mutant != parent and space.holds(mutant):
            found[mutant] = None
    return list(found)


def _finite(score: float) -> float:
    return score if math.isfinite(score) else math.inf
