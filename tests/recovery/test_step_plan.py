"""Plans of progressive steps: exact targets, nothing becomes denser."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedeploy.allocation.base import Allocation, layer_units
from sparsedeploy.allocation.mixed import MixedOptions
from sparsedeploy.allocation.rmi import default_delta
from sparsedeploy.plan import NM, MixedNM, ModuleShape, SparsityPlan, parse_pattern
from sparsedeploy.recovery.schedule import sparsity_schedule
from sparsedeploy.recovery.step_plan import clamp_to_floor, step_plan, window


def shapes(layers: int) -> list[list[ModuleShape]]:
    """Grouped-query layers: k is half as tall as q; sizes differ inside a layer, not between layers."""
    sides = {"q": (32, 32), "k": (16, 32), "up": (88, 32), "down": (32, 88)}
    return [[ModuleShape(f"layers.{i}.{n}", r, c) for n, (r, c) in sides.items()] for i in range(layers)]


def rmi_shares(layers: list[list[ModuleShape]], importance: list[float], sparsity: float) -> Allocation:
    units = layer_units(layers, [0.0] * len(layers))
    return Allocation(units, window=default_delta(sparsity), ranking=tuple(importance))


def plans(final: float, pattern: NM | MixedNM | None, seed: int, layers: int = 8) -> list[SparsityPlan]:
    """Five cubic steps; the layers' importance is drawn anew at every step, the worst case for nesting."""
    rng = random.Random(seed)
    depth = shapes(layers)
    done: list[SparsityPlan] = []
    for sparsity in sparsity_schedule(final, 5):
        allocated = rmi_shares(depth, [rng.random() for _ in depth], sparsity)
        before = done[-1] if done else None
        done.append(step_plan(allocated, depth, sparsity, pattern, before=before, allocation="rmi"))
    return done


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([0.3, 0.5, 0.6, 0.7, 0.8, 0.9]), st.integers(0, 1000))
def test_every_step_meets_its_target_and_never_revives(final: float, seed: int) -> None:
    steps = plans(final, None, seed)
    total = sum(t.size for t in steps[0].targets)
    one_row_unit = max(t.rows for t in steps[0].targets) / total
    for plan, sparsity in zip(steps, sparsity_schedule(final, 5), strict=True):
        assert abs(plan.achieved - sparsity) <= one_row_unit
    for before, after in itertools.pairwise(steps):
        for a, b in zip(before.targets, after.targets, strict=True):
            assert b.zeros_per_row >= a.zeros_per_row


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["2:8", "2:4", "4:8", "mixed-2:8", "mixed-2:4", "mixed-2.5:8"]), st.integers(0, 1000))
def test_n_of_m_steps_only_fall_and_end_at_the_pattern(text: str, seed: int) -> None:
    pattern = parse_pattern(text)
    assert pattern is not None
    steps = plans(pattern.sparsity, pattern, seed)
    for before, after in itertools.pairwise(steps):
        for a, b in zip(before.targets, after.targets, strict=True):
            assert a.pattern is not None
            assert b.pattern is not None
            assert b.pattern.n <= a.pattern.n
    last = steps[-1]
    assert last.pattern == text
    assert abs(last.achieved - pattern.sparsity) < 1e-12
    kept = [t.pattern.n for t in last.targets if t.pattern]
    assert min(kept) >= 1
    if isinstance(pattern, NM):
        assert set(kept) == {pattern.n}


def test_mixed_patterns_keep_more_where_it_matters() -> None:
    depth = shapes(8)
    before = None
    for sparsity in sparsity_schedule(0.75, 5):
        allocated = rmi_shares(depth, [float(at) for at in range(8)], sparsity)
        before = step_plan(allocated, depth, sparsity, MixedNM(2, 8), before=before, allocation="rmi")
    assert before is not None
    kept = [before.by_name[layer[0].name].pattern.n for layer in depth]  # type: ignore[union-attr]
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]
    assert sum(kept) == 16


def test_bounds_of_n_hold_at_the_last_step() -> None:
    depth = shapes(8)
    before = None
    for sparsity in sparsity_schedule(0.75, 5):
        allocated = rmi_shares(depth, [float(at**3) for at in range(8)], sparsity)
        mixed = MixedOptions(strength=6, n_min=1, n_max=3)
        before = step_plan(allocated, depth, sparsity, MixedNM(2, 8), before=before, mixed=mixed, allocation="rmi")
    assert before is not None
    kept = [target.pattern.n for target in before.targets if target.pattern]
    assert max(kept) == 3
    assert min(kept) == 1
    assert before.achieved == 0.75


def test_average_kept_follows_the_schedule() -> None:
    steps = plans(0.75, MixedNM(2, 8), 0, layers=32)
    averages = [
        sum(t.pattern.n * t.size for t in p.targets if t.pattern) / sum(t.size for t in p.targets) for p in steps
    ]
    assert averages == pytest.approx([5.07, 3.30, 2.38, 2.05, 2.00], abs=0.5 / 32 + 0.005)


def test_less_important_layers_lose_more() -> None:
    depth = shapes(4)
    plan = step_plan(rmi_shares(depth, [0.9, 0.1, 0.5, 0.2], 0.7), depth, 0.7, None, before=None, allocation="rmi")
    rate = [sum(plan.by_name[m.name].zeros for m in layer) / sum(m.size for m in layer) for layer in depth]
    assert rate[0] == pytest.approx(0.67, abs=0.01)
    assert rate[1] == pytest.approx(0.73, abs=0.01)
    assert rate[2] < rate[3]


def test_the_window_widens_when_current_rates_leave_no_room() -> None:
    """Two layers far apart: the window around the target alone would overshoot it."""
    low, high = window([0.9, 0.1], [1, 1], 0.55, 0.03)
    assert sum(low) / 2 <= 0.55 <= sum(high) / 2
    assert low[0] >= 0.9


def test_lift_restores_the_total() -> None:
    modules = [ModuleShape(name, rows, 100) for name, rows in (("a", 10), ("b", 10), ("c", 20))]
    lifted = clamp_to_floor([50, 50, 50], [53, 40, 40], modules)
    assert lifted[0] == 53
    assert sum(n * m.rows for n, m in zip(lifted, modules, strict=True)) == 50 * 40


@pytest.mark.parametrize("rule", ["additive", "multiplicative"])
def test_any_allocators_wishes_are_followed_above_the_bounds(rule: str) -> None:
    depth = shapes(4)
    values = [-0.1, 0.1, 0.0, 0.0] if rule == "additive" else [0.8, 1.2, 1.0, 1.0]
    allocated = Allocation(layer_units(depth, values), rule)  # type: ignore[arg-type]
    first = step_plan(allocated, depth, 0.4, None, before=None, allocation="owl")
    turned = Allocation(layer_units(depth, values[::-1]), rule)  # type: ignore[arg-type]
    second = step_plan(turned, depth, 0.5, None, before=first, allocation="owl")
    assert second.achieved == pytest.approx(0.5, abs=2e-3)
    for a, b in zip(first.targets, second.targets, strict=True):
        assert b.zeros_per_row >= a.zeros_per_row
