"""The evolutionary search on functions whose best answer is known."""

import random
from dataclasses import replace

import pytest

from sparsedeploy.allocation.evolve import EvolveOptions, Generation, Levels, Space, evolve, stages
from sparsedeploy.errors import UserError

WINDOWS = 8


def space_of(sizes: tuple[int, ...], levels: int, share: float, groups: tuple[tuple[int, ...], ...] = ()) -> Space:
    """Modules whose level l removes l / levels of their weights."""
    removed = tuple(tuple(size * level // levels for level in range(levels + 1)) for size in sizes)
    return Space(removed, int(share * sum(sizes)), groups)


def quadratic(best: Levels, weights: tuple[float, ...]) -> tuple[list[tuple[Levels, range]], object]:
    """A fitness with its lowest value at ``best``, with a little noise on single windows; and what was asked."""
    asked: list[tuple[Levels, range]] = []

    def fitness(levels: Levels, windows: range) -> float:
        asked.append((levels, windows))
        noise = sum(random.Random(f"{levels}{window}").random() for window in windows) / len(windows)
        exact = 0.0 if len(windows) == WINDOWS else 0.01 * noise
        return sum(w * (a - b) ** 2 for w, a, b in zip(weights, levels, best, strict=True)) + exact

    return asked, fitness


def test_finds_the_best_of_equal_sizes() -> None:
    best = (2, 5, 8, 3, 7, 5, 1, 9)
    space = space_of((1000,) * 8, 10, 0.5)
    assert space.holds(best)
    _, fitness = quadratic(best, (1, 2, 1, 3, 1, 1, 2, 1))
    options = EvolveOptions(generations=200, patience=0, offspring=16)
    found = evolve(space, [(5,) * 8], fitness, windows=WINDOWS, options=options)
    assert found.levels == best
    assert found.fitness == 0


def test_every_vector_that_is_measured_meets_the_budget() -> None:
    sizes = (900, 300, 300, 900, 2400, 2400, 2400) * 2
    space = space_of(sizes, 20, 0.7, groups=(tuple(range(7)), tuple(range(7, 14)), (0, 7), (6, 13)))
    asked, fitness = quadratic((10,) * 14, (1.0,) * 14)
    start = space.nearest([0.7 * size for size in sizes], random.Random(0))
    evolve(space, [start], fitness, windows=WINDOWS, options=EvolveOptions(generations=20))
    assert len({levels for levels, _ in asked}) > 50
    for levels, _ in asked:
        assert 0 <= space.surplus(levels) < space.slack
        assert all(0 <= level <= 20 for level in levels)


def test_never_worse_than_any_start_and_few_windows_come_first() -> None:
    space = space_of((1000,) * 6, 10, 0.5)
    starts = [(5,) * 6, (4, 6, 4, 6, 4, 6), (6, 4, 6, 4, 6, 4)]
    asked, fitness = quadratic((9, 1, 9, 1, 9, 1), (1.0,) * 6)
    found = evolve(space, starts, fitness, windows=WINDOWS, options=EvolveOptions(generations=1, offspring=16))
    assert found.fitness <= min(fitness(start, range(WINDOWS)) for start in starts)
    widths = [len(windows) for _, windows in asked[3:-3]]
    assert widths == [1] * 16 + [2] * 4 + [8]


def test_a_resumed_search_is_the_same_search() -> None:
    space = space_of((1000,) * 6, 10, 0.5)
    _, fitness = quadratic((9, 1, 8, 2, 7, 3), (1, 2, 3, 1, 2, 3))
    options = EvolveOptions(generations=12, patience=0, offspring=4)
    history: list[Generation] = []
    whole = evolve(space, [(5,) * 6], fitness, windows=WINDOWS, options=options, record=history.append)
    assert [state.number for state in history] == list(range(13))
    for state in history[::3]:
        again = Generation.from_dict(state.to_dict())
        assert again == state
        assert evolve(space, [], fitness, windows=WINDOWS, options=options, resumed=again) == whole
    other = evolve(space, [(5,) * 6], fitness, windows=WINDOWS, options=replace(options, seed=1))
    assert other.number == 12


def test_patience_ends_it() -> None:
    space = space_of((1000,) * 4, 10, 0.5)
    _, fitness = quadratic((5,) * 4, (1.0,) * 4)
    found = evolve(space, [(5,) * 4], fitness, windows=WINDOWS, options=EvolveOptions(generations=99, patience=3))
    assert (found.number, found.levels) == (3, (5,) * 4)


def test_what_diverges_is_never_chosen_and_all_diverged_is_refused() -> None:
    space = space_of((1000,) * 4, 10, 0.5)

    def fitness(levels: Levels, windows: range) -> float:
        return float("nan") if levels != (5,) * 4 else 1.0

    found = evolve(space, [(5,) * 4], fitness, windows=WINDOWS, options=EvolveOptions(generations=5))
    assert found.levels == (5,) * 4
    with pytest.raises(UserError, match="every plan that the search starts from has diverged"):
        evolve(space, [(4, 6, 5, 5)], fitness, windows=WINDOWS, options=EvolveOptions(generations=5))


def test_a_budget_that_no_level_reaches_is_refused() -> None:
    with pytest.raises(UserError, match="no levels of the database meet the budget"):
        Space(((0, 50, 90), (0, 50, 90)), 190)


def test_a_space_of_one_vector_ends() -> None:
    found = evolve(
        Space(((0, 10),), 10), [(1,)], lambda levels, windows: 1.0, windows=1, options=EvolveOptions(generations=2)
    )
    assert found.levels == (1,)


def test_stages() -> None:
    assert stages(16, 16) == [(16, 1), (4, 4), (1, 16)]
    assert stages(64, 64) == [(64, 1), (16, 4), (4, 16), (1, 64)]
    assert stages(1, 5) == [(1, 5)]
    assert stages(4, 2) == [(4, 1), (1, 2)]


def test_slopes_lead_to_the_best_sooner() -> None:
    """The exact slopes of a quadratic over 60 modules, against chance alone, with as many generations."""
    best = tuple(random.Random(1).choices((2, 4, 6, 8), k=60))
    size = 1000
    space = Space(tuple(tuple(size * level for level in range(11)) for _ in best), size * sum(best))
    start = space.nearest([size * sum(best) / 60] * 60, random.Random(0))

    def slopes(levels: Levels) -> list[tuple[float, float]]:
        apart = [(a - b) ** 2 for a, b in zip(levels, best, strict=True)]
        return [
            ((at - 1 - b) ** 2 - d if at else float("nan"), (at + 1 - b) ** 2 - d if at < 10 else float("nan"))
            for at, b, d in zip(levels, best, apart, strict=True)
        ]

    found = {}
    for guided in (True, False):
        asked, fitness = quadratic(best, (1.0,) * 60)
        options = EvolveOptions(generations=12, offspring=8, guided=guided)
        found[guided] = evolve(space, [start], fitness, windows=WINDOWS, options=options, slopes=slopes)
        assert all(space.holds(levels) for levels, _ in asked)
    assert found[True].fitness < 0.5 * found[False].fitness


def test_without_slopes_all_mutants_are_random() -> None:
    space = space_of((1000,) * 6, 10, 0.5)
    _, fitness = quadratic((9, 1, 8, 2, 7, 3), (1, 2, 3, 1, 2, 3))
    options = EvolveOptions(generations=3, offspring=4)
    one = evolve(space, [(5,) * 6], fitness, windows=WINDOWS, options=options, slopes=lambda levels: None)
    two = evolve(space, [(5,) * 6], fitness, windows=WINDOWS, options=replace(options, guided=False))
    assert one == two
