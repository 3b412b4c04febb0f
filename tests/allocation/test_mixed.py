"""Mixed N:M: exact budgets by apportionment and by marginal cost."""

from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedeploy.allocation.base import Allocation, Unit
from sparsedeploy.allocation.mixed import (
    MixedOptions,
    apportion,
    cheapest_counts,
    desired_counts,
    mixed_plan,
    step_costs,
)
from sparsedeploy.errors import UserError
from sparsedeploy.plan import NM, MixedNM, parse_pattern
from tests.allocation.shapes import llama_layers


def kept(importance: list[float], sizes: list[int], average: float, m: int, strength: float = 2.0) -> list[int]:
    return apportion(desired_counts(importance, sizes, average, strength), sizes, average, low=1, high=m)


@pytest.mark.parametrize(
    ("strength", "expected"), [(2.0, {1: 8, 2: 16, 3: 8}), (1.0, {1: 1, 2: 30, 3: 1}), (0.0, {2: 32})]
)
def test_published_example(strength: float, expected: dict[int, int]) -> None:
    counts = kept([float(i) for i in range(32)], [7] * 32, 2, 8, strength)
    assert Counter(counts) == expected
    assert counts == sorted(counts)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-50, 50).map(float), min_size=1, max_size=20),
    st.sampled_from([2, 4, 8]),
    st.floats(0, 1),
    st.floats(0.1, 6),
)
def test_equal_sizes_meet_the_budget_exactly(importance: list[float], m: int, position: float, strength: float) -> None:
    average = 1 + position * (m - 1)
    counts = kept(importance, [3] * len(importance), average, m, strength)
    assert sum(counts) == round(average * len(importance))
    assert all(1 <= n <= m for n in counts)
    for a, x in enumerate(importance):
        for b, y in enumerate(importance):
            assert not x < y or counts[a] <= counts[b]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 9)), min_size=1, max_size=12), st.floats(0, 1))
def test_unequal_sizes_never_overspend(drawn: list[tuple[float, int]], position: float) -> None:
    importance, sizes = [i for i, _ in drawn], [p for _, p in drawn]
    average = 1 + 7 * position
    counts = kept(importance, sizes, average, 8)
    budget = round(average * len(sizes)) * sizes[0] if len(set(sizes)) == 1 else average * sum(sizes)
    spent = sum(p * n for p, n in zip(sizes, counts, strict=True))
    assert budget - max(sizes) - 1 <= spent <= budget + 1e-6


def test_own_bounds_per_unit_for_masks_that_nest() -> None:
    counts = apportion([4.0, 2.0, 2.0], [1, 1, 1], 2, low=1, high=[2, 3, 3])
    assert counts[0] <= 2
    assert sum(counts) == 6


@pytest.mark.parametrize(
    ("average", "low", "high"),
    [(2.0, 3, 8), (7.0, 1, 6), (2.0, [1, 3, 3], 8), (2.0, 0, 8), (2.0, [2, 2, 2], [1, 8, 8])],
)
def test_impossible_bounds_are_refused(average: float, low: int | list[int], high: int | list[int]) -> None:
    for call in (
        lambda: apportion([average] * 3, [1] * 3, average, low=low, high=high),
        lambda: cheapest_counts([[1.0] * 8] * 3, [1] * 3, average, low=low, high=high),
    ):
        with pytest.raises(UserError, match="cannot be met with N from"):
            call()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mixed-9:8", "mixed-9:8 keeps 9 of 8 on average"),
        ("mixed-0:8", "keeps 0 of 8 on average"),
        ("mixed-0.5:8", "keeps 0.5 of 8 on average"),
        ("mixed-2", "pattern 'mixed-2' is not known"),
        ("mixed", "pattern 'mixed' is not known"),
    ],
)
def test_impossible_patterns_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_pattern(text)


def test_patterns_read_back() -> None:
    for text in ("2:4", "mixed-2:8", "mixed-2.5:8"):
        assert str(parse_pattern(text)) == text
    assert parse_pattern("unstructured") is None
    assert parse_pattern("mixed-2.5:8") == MixedNM(2.5, 8)


def scores(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 16, generator=generator).abs() ** (1 + seed)


def test_step_costs_are_what_each_step_loses() -> None:
    one = scores(1)
    costs = step_costs([one], 4)
    groups = one.reshape(-1, 4).sort(dim=1, descending=True).values.double()
    for n in range(1, 5):
        lost = groups[:, n:].square().sum(), groups[:, n - 1 :].square().sum()
        assert costs[n - 1].item() == pytest.approx((lost[1] - lost[0]).item())
    assert (costs.diff() <= 0).all()
    with pytest.raises(UserError, match="16 inputs are not divisible by 3"):
        step_costs([one], 3)


def test_marginal_greedy_is_optimal_for_equal_sizes() -> None:
    costs = [(step_costs([scores(s)], 4) / step_costs([scores(s)], 4).sum()).tolist() for s in range(4)]

    def loss(counts: tuple[int, ...]) -> float:
        return sum(sum(costs[u][n:]) for u, n in enumerate(counts))

    for average in (1.0, 1.5, 2.0, 3.25):
        counts = cheapest_counts(costs, [5] * 4, average, low=1, high=4)
        assert sum(counts) == round(average * 4)
        best = min(loss(c) for c in product(range(1, 5), repeat=4) if sum(c) == round(average * 4))
        assert loss(tuple(counts)) == pytest.approx(best)


def test_marginal_greedy_with_unequal_sizes_never_overspends() -> None:
    costs = [step_costs([scores(s)], 8).tolist() for s in range(5)]
    sizes = [9, 4, 4, 7, 1]
    for tenths in range(10, 81, 5):
        counts = cheapest_counts(costs, sizes, tenths / 10, low=1, high=8)
        unspent = tenths / 10 * sum(sizes) - sum(p * n for p, n in zip(sizes, counts, strict=True))
        assert unspent >= -1e-6
        assert unspent <= max(sizes)


def layer_shares(values: list[float], ranking: tuple[float, ...] | None = None) -> Allocation:
    layers = llama_layers(len(values), 64, 128)
    return Allocation(
        tuple(Unit(tuple(m.name for m in layer), v) for layer, v in zip(layers, values, strict=True)), ranking=ranking
    )


def test_plan_gives_more_to_important_layers() -> None:
    layers = llama_layers(4, 64, 128)
    plan = mixed_plan(layer_shares([-0.1, 0.0, 0.05, 0.1]), layers, MixedNM(2, 8), allocation="owl")
    assert plan.pattern == "mixed-2:8"
    assert plan.achieved == plan.sparsity == 0.75
    by_layer = [target.pattern for target in plan.targets][::7]
    assert by_layer == [NM(3, 8), NM(2, 8), NM(2, 8), NM(1, 8)]
    ranked = mixed_plan(
        layer_shares([0.03, 0.03, -0.03, -0.03], (0.0, 1.0, 2.0, 3.0)), layers, MixedNM(2, 8), allocation="rmi"
    )
    assert [t.pattern.n for t in ranked.targets if t.pattern][::7] == [1, 2, 2, 3]


def test_plan_from_rates() -> None:
    layers = llama_layers(4, 64, 128)
    allocated = layer_shares([-0.2, -0.1, 0.1, 0.2])
    plan = mixed_plan(allocated, layers, MixedNM(4, 8), allocation="atp", mixed=MixedOptions(wanted="rates"))
    assert plan.details["kept"] == [6, 5, 3, 2]  # 8 * (0.5 + ...) = 5.6, 4.8, 3.2, 2.4


def test_marginal_plan_follows_costs_and_importance() -> None:
    layers = llama_layers(2, 64, 128)
    flat, steep = [8.0, 7.9, 7.8, 7.7], [8.0, 1.0, 0.1, 0.0]
    costs = {m.name: torch.tensor(c).double() for layer, c in zip(layers, (flat, steep), strict=True) for m in layer}
    plan = mixed_plan(
        layer_shares([0.0, 0.0]),
        layers,
        MixedNM(2, 4),
        allocation="uniform",
        mixed=MixedOptions("marginal"),
        costs=costs,
    )
    assert plan.details["kept"] == [3, 1]
    same = dict.fromkeys(costs, torch.tensor(flat).double())
    weighted = mixed_plan(
        layer_shares([0.1, -0.1]), layers, MixedNM(2, 4), allocation="owl", mixed=MixedOptions("marginal"), costs=same
    )
    assert weighted.details["kept"][0] < weighted.details["kept"][1]


def test_inputs_must_be_divisible() -> None:
    with pytest.raises(UserError, match="not divisible by the 8 of"):
        mixed_plan(layer_shares([0.0]), llama_layers(1, 12, 20), MixedNM(2, 8), allocation="uniform")
