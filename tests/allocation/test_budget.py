"""One routine takes any deviations to rates and counts that meet the weighted target."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedeploy.allocation.base import Allocation, Unit, centred_range, tabulated_strength
from sparsedeploy.allocation.budget import integer_counts, meet_target, plan_from_allocation
from sparsedeploy.errors import UserError
from sparsedeploy.plan import NM, ModuleShape

units = st.lists(
    st.tuples(st.floats(-2, 2), st.integers(1, 40), st.integers(2, 300)),  # deviation, rows, columns
    min_size=1,
    max_size=12,
)


def weighted_mean(rates: list[float], sizes: list[int]) -> float:
    return math.fsum(r * p for r, p in zip(rates, sizes, strict=True)) / sum(sizes)


@settings(max_examples=200, deadline=None)
@given(units, st.floats(0, 0.99))
def test_rates_meet_the_weighted_target_within_bounds(drawn: list[tuple[float, int, int]], target: float) -> None:
    sizes = [rows * columns for _, rows, columns in drawn]
    deviations = [value for value, _, _ in drawn]
    rates = meet_target(deviations, sizes, target)
    assert weighted_mean(rates, sizes) == pytest.approx(target, abs=1e-9)
    assert all(0 <= rate <= 0.99 for rate in rates)
    for a, x in enumerate(deviations):  # clipping keeps the order
        for b, y in enumerate(deviations):
            assert not x < y or rates[a] <= rates[b]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 3), st.integers(1, 5000)), min_size=1, max_size=12), st.floats(0, 0.99))
def test_multiplicative_rates(drawn: list[tuple[float, int]], target: float) -> None:
    factors, sizes = [f for f, _ in drawn], [p for _, p in drawn]
    rates = meet_target(factors, sizes, target, rule="multiplicative")
    assert weighted_mean(rates, sizes) == pytest.approx(target, abs=1e-9)
    free = [i for i, rate in enumerate(rates) if 1e-6 < rate < 0.99]
    for a, b in itertools.pairwise(free):
        assert rates[a] * factors[b] == pytest.approx(rates[b] * factors[a], rel=1e-6)


@settings(max_examples=200, deadline=None)
@given(units, st.floats(0, 0.9))
def test_counts_miss_the_target_by_less_than_one_row_unit(drawn: list[tuple[float, int, int]], target: float) -> None:
    modules = [ModuleShape(f"m{i}", rows, columns + 100) for i, (_, rows, columns) in enumerate(drawn)]
    sizes = [module.size for module in modules]
    rates = meet_target([value for value, _, _ in drawn], sizes, target)
    counts = integer_counts(modules, rates, target)
    zeros = sum(count * module.rows for count, module in zip(counts, modules, strict=True))
    assert abs(zeros - target * sum(sizes)) < max(module.rows for module in modules)
    assert all(0 <= count < module.columns for count, module in zip(counts, modules, strict=True))


def test_own_bounds_per_unit() -> None:
    rates = meet_target([0.0, 0.0, 0.0], [1, 2, 1], 0.5, low=[0.6, 0.0, 0.0], high=[0.9, 0.3, 0.9])
    assert rates[0] >= 0.6
    assert rates[1] <= 0.3
    assert weighted_mean(rates, [1, 2, 1]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("values", "target", "message"),
    [
        ([0.0, math.nan], 0.5, "score of unit 1 is nan"),
        ([math.inf, 0.0], 0.5, "score of unit 0 is inf"),
        ([0.0, 0.0], 0.995, "sparsity 0.995 cannot be met with rates between 0 and 0.99"),
    ],
)
def test_refused_values(values: list[float], target: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        meet_target(values, [1, 1], target)


def test_refused_bounds_and_factors() -> None:
    with pytest.raises(UserError, match="cannot be met with rates between"):
        meet_target([0.0, 0.0], [1, 1], 0.8, high=0.7)
    with pytest.raises(UserError, match="factor that is not positive"):
        meet_target([0.0, 1.0], [1, 1], 0.5, rule="multiplicative")
    with pytest.raises(UserError, match="leave rows without any weight"):
        integer_counts([ModuleShape("a", 4, 8), ModuleShape("b", 4, 8)], [0.95, 0.95], 0.95)


def test_a_fixed_pattern_needs_equal_rates() -> None:
    layers = [[ModuleShape("a", 4, 8)], [ModuleShape("b", 4, 8)]]
    unequal = Allocation((Unit(("a",), 0.1), Unit(("b",), -0.1)))
    with pytest.raises(UserError, match="fixed pattern 2:4") as error:
        plan_from_allocation(unequal, layers, 0.5, allocation="owl", pattern=NM(2, 4))
    assert "mixed-2:4" in str(error.value)


def test_range_is_twice_the_strength_and_scores_must_be_finite() -> None:
    density = centred_range([3.0, 1.0, 2.0, 2.5], 0.08)
    assert max(density) - min(density) == pytest.approx(0.16, abs=1e-15)
    assert math.fsum(density) == pytest.approx(0, abs=1e-15)
    assert centred_range([2.0, 2.0], 0.08) == [0, 0]
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError, match="score of unit 1"):
            centred_range([1.0, bad], 0.1)


def test_published_strengths() -> None:
    asked = (0.05, 0.1, 0.2, 0.29, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.95)
    assert [tabulated_strength(s) for s in asked] == [0.06, 0.06, 0.02, 0.02, 0.04, 0.04, 0.1, 0.15, 0.15, 0.12, 0.12]
