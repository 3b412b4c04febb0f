"""The plan of one LoSA step: an allocator's rates, and what is pruned already stays pruned.

A pruner gives zeros the lowest score, so a layer cannot become denser again; without lower bounds the model would end
up sparser than asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparsedeploy.allocation.base import Allocation
from sparsedeploy.allocation.budget import HIGHEST_RATE, integer_counts, meet_target, nm_target, unit_sizes
from sparsedeploy.allocation.mixed import MixedOptions, apportion, desired_counts
from sparsedeploy.allocation.rmi import bounded_allocation
from sparsedeploy.plan import NM, MixedNM, ModuleShape, ModuleTarget, SparsityPlan


def step_plan(
    allocated: Allocation,
    layers: list[list[ModuleShape]],
    sparsity: float,
    pattern: NM | MixedNM | None,
    *,
    before: SparsityPlan | None,
    mixed: MixedOptions | None = None,
    allocation: str,
    options: Mapping[str, Any] | None = None,
    model_sha256: str | None = None,
) -> SparsityPlan:
    """The plan that reaches ``sparsity`` from ``before`` without making any module denser.

    Args:
        sparsity: after this step, over the whole model.
        pattern: of the last step; earlier ones keep more of every M, on average M (1 - sparsity).
        before: the plan of the step before.
        mixed: strength and bounds of N, for mixed patterns.

    Raises:
        UserError: a target that the bounds or shapes cannot meet.
    """
    modules = [module for layer in layers for module in layer]
    least = {target.name: target for target in before.targets} if before else {}
    if pattern is None:
        targets = _unstructured(allocated, modules, sparsity, least)
        name = "unstructured"
    else:
        kept = _kept(allocated, modules, sparsity, pattern, least, mixed or MixedOptions())
        n_of = {name: n for unit, n in zip(allocated.units, kept, strict=True) for name in unit.modules}
        targets = [nm_target(module, NM(n_of[module.name], pattern.m)) for module in modules]
        reached = abs(sparsity - pattern.sparsity) < 1e-9
        name = str(pattern) if reached else str(MixedNM(pattern.m * (1 - sparsity), pattern.m))
    return SparsityPlan(
        sparsity=sparsity,
        pattern=name,
        allocation=allocation,
        targets=tuple(targets),
        options=dict(options or {}),
        model_sha256=model_sha256,
        details=allocated.details or {},
    )


def _unstructured(
    allocated: Allocation, modules: Sequence[ModuleShape], sparsity: float, least: Mapping[str, ModuleTarget]
) -> list[ModuleTarget]:
    sizes = unit_sizes(allocated, modules)
    current = [
        sum(least[name].zeros for name in unit.modules) / size if least else 0.0
        for unit, size in zip(allocated.units, sizes, strict=True)
    ]
    if allocated.ranking is not None and allocated.window is not None:
        low, high = window(current, sizes, sparsity, allocated.window)
        rates = bounded_allocation(allocated.ranking, sizes, sparsity, low, high)
    else:
        values = [unit.value for unit in allocated.units]
        high = [max(HIGHEST_RATE, rate) for rate in current]
        rates = meet_target(values, sizes, sparsity, rule=allocated.rule, low=current, high=high)
    rate_of = {name: rate for unit, rate in zip(allocated.units, rates, strict=True) for name in unit.modules}
    counts = integer_counts(modules, [rate_of[module.name] for module in modules], sparsity)
    if least:
        counts = clamp_to_floor(counts, [least[module.name].zeros_per_row for module in modules], modules)
    return [ModuleTarget(m.name, m.rows, m.columns, count) for m, count in zip(modules, counts, strict=True)]


def window(
    current: Sequence[float], sizes: Sequence[int], sparsity: float, delta: float
) -> tuple[list[float], list[float]]:
    """Bounds sparsity -+ delta that no unit's current rate exceeds, widened downwards until the target lies between.

    The current rates themselves always allow it: their mean is an earlier, lower target.
    """
    total = sum(sizes)

    def mean(rates: Sequence[float]) -> float:
        return math.fsum(size * rate for size, rate in zip(sizes, rates, strict=True)) / total

    wide = delta
    low = [max(sparsity - wide, rate) for rate in current]
    while mean(low) > sparsity and wide < 1:
        wide = max(2 * wide, 1e-3)
        low = [max(sparsity - wide, rate) for rate in current]
    return low, [max(min(sparsity + delta, HIGHEST_RATE), rate) for rate in low]


def clamp_to_floor(counts: Sequence[int], least: Sequence[int], modules: Sequence[ModuleShape]) -> list[int]:
    """Raise counts of zeros per row to ``least`` and take as many zeros from the modules that can spare them."""
    lifted = [max(count, bound) for count, bound in zip(counts, least, strict=True)]
    surplus = sum((new - old) * m.rows for new, old, m in zip(lifted, counts, modules, strict=True))
    for at, module in enumerate(modules):
        spare = min(lifted[at] - least[at], math.floor(surplus / module.rows + 0.5))
        if spare > 0:
            lifted[at] -= spare
            surplus -= spare * module.rows
    return lifted


def _kept(
    allocated: Allocation,
    modules: Sequence[ModuleShape],
    sparsity: float,
    pattern: NM | MixedNM,
    least: Mapping[str, ModuleTarget],
    mixed: MixedOptions,
) -> list[int]:
    """N of each unit: at most what it kept before, at least what the pattern keeps in the end."""
    sizes = unit_sizes(allocated, modules)
    average = pattern.m * (1 - sparsity)
    fixed = isinstance(pattern, NM)
    low = pattern.n if isinstance(pattern, NM) else mixed.n_min
    # An upper bound of the last step only: earlier steps keep more on average than it may allow.
    top = pattern.m if fixed or mixed.n_max is None else max(mixed.n_max, math.ceil(average - 1e-9))
    high = [min(_n_before(least[unit.modules[0]]) if least else pattern.m, top) for unit in allocated.units]
    if sum(s * n for s, n in zip(sizes, high, strict=True)) <= average * sum(sizes):
        return high  # a step too small for one whole N
    return apportion(
        desired_counts(allocated.importance, sizes, average, mixed.strength), sizes, average, low=low, high=high
    )


def _n_before(target: ModuleTarget) -> int:
    assert target.pattern is not None
    return target.pattern.n
