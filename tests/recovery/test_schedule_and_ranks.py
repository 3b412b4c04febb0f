"""Schedules, mean ranks and the rank budget."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedeploy.errors import UserError
from sparsedeploy.recovery.adapter_ranks import allocate_ranks
from sparsedeploy.recovery.schedule import mean_ranks, sparsity_schedule


@pytest.mark.parametrize(
    ("final", "expected"),
    [
        (0.5, [0.2440, 0.3920, 0.4680, 0.4960, 0.5]),
        (0.7, [0.3416, 0.5488, 0.6552, 0.6944, 0.7]),
        (0.8, [0.3904, 0.6272, 0.7488, 0.7936, 0.8]),
    ],
)
def test_cubic_schedule_is_the_published_table(final: float, expected: list[float]) -> None:
    assert sparsity_schedule(final, 5) == pytest.approx(expected, abs=1e-12)


def test_schedules_end_exactly_at_the_target_and_never_fall() -> None:
    for shape in ("cubic", "linear"):
        rates = sparsity_schedule(0.7, 7, shape)
        assert rates[-1] == 0.7
        assert rates == sorted(rates)
    assert sparsity_schedule(0.6, 3, "linear") == pytest.approx([0.2, 0.4, 0.6])


def test_mean_ranks_average_the_baselines_rank() -> None:
    assert mean_ranks(5) == [6, 7, 8, 9, 10]
    assert sum(mean_ranks(5)) / 5 == 8


@pytest.mark.parametrize("call", [lambda: sparsity_schedule(1.0, 5), lambda: sparsity_schedule(0.5, 0)])
def test_impossible_schedules_are_refused(call: object) -> None:
    with pytest.raises(UserError):
        call()  # type: ignore[operator]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-8, 4), min_size=1, max_size=40), st.floats(1, 16))
def test_rank_budget_is_met_exactly_and_ranks_rise_with_the_loss(exponents: list[float], omega: float) -> None:
    losses = [math.exp(x) for x in exponents]
    ranks = allocate_ranks(losses, omega, r_max=16)
    assert sum(ranks) == round(omega * len(losses))
    assert all(1 <= rank <= 16 for rank in ranks)
    pairs = sorted(zip(losses, ranks, strict=True))
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(pairs) if a[0] < b[0])


def test_the_released_budget_fix_misses_what_ours_meets() -> None:
    losses = [math.exp(-4 + 6 * at / 31) for at in range(32)]
    assert sum(allocate_ranks(losses, 10, one_pass=True)) < 320
    assert sum(allocate_ranks(losses, 10)) == 320


def test_equal_or_zero_losses_share_equally() -> None:
    assert allocate_ranks([0.0, 0.0, 0.0], 6) == [6, 6, 6]
    assert allocate_ranks([2.0, 2.0], 7) == [7, 7]


@pytest.mark.parametrize("losses", [[1.0, float("nan")], [-1.0, 2.0], [float("inf")]])
def test_losses_that_are_no_losses_are_refused(losses: list[float]) -> None:
    with pytest.raises(UserError, match="reconstruction loss of layer"):
        allocate_ranks(losses, 6)


def test_a_mean_above_the_adapters_size_is_refused() -> None:
    with pytest.raises(UserError, match="r_max"):
        allocate_ranks([1.0], 9, r_max=8)
