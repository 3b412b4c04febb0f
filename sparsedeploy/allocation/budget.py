"""From an allocator's deviations to rates and integer counts that meet the parameter-weighted target exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparsedeploy.allocation.base import Allocation, check_scores
from sparsedeploy.errors import UserError
from sparsedeploy.plan import NM, ModuleShape, ModuleTarget, SparsityPlan, check_sparsity

LOWEST_RATE = 0.0
HIGHEST_RATE = 0.99
_BISECTIONS = 200


def meet_target(
    values: Sequence[float],
    sizes: Sequence[int],
    target: float,
    *,
    rule: str = "additive",
    low: Sequence[float] | float = LOWEST_RATE,
    high: Sequence[float] | float = HIGHEST_RATE,
) -> list[float]:
    """Rates within [low, high] whose size-weighted mean is ``target``.

    additive: s_u = clip(target + v_u + tau); multiplicative: s_u = clip(c * v_u); tau or c by bisection, since the
    weighted sum is monotone in it.

    Args:
        low, high: one bound for all units or one per unit.

    Raises:
        UserError: values that are not finite, or bounds that cannot meet the target.
    """
    count = len(values)
    lows = [float(low)] * count if isinstance(low, (int, float)) else [float(x) for x in low]
    highs = [float(high)] * count if isinstance(high, (int, float)) else [float(x) for x in high]
    check_scores(values)
    if rule == "multiplicative" and min(values) <= 0:
        raise UserError("a multiplicative allocation has a factor that is not positive", "Lower the method's strength.")
    total = sum(sizes)

    def mean(rates: Sequence[float]) -> float:
        return math.fsum(size * rate for size, rate in zip(sizes, rates, strict=True)) / total

    if not mean(lows) - 1e-12 <= target <= mean(highs) + 1e-12:
        raise UserError(
            f"sparsity {target:g} cannot be met with rates between {mean(lows):g} and {mean(highs):g}",
            "Choose a target inside these bounds.",
        )

    def rates_at(knob: float) -> list[float]:
        raw = (target + v + knob for v in values) if rule == "additive" else (v * knob for v in values)
        return [min(max(r, lo), hi) for r, lo, hi in zip(raw, lows, highs, strict=True)]

    if rule == "additive":
        reach = max(abs(v) for v in values) + max(highs) - min(lows) + 1
        left, right = -reach, reach
    else:
        left, right = 0.0, max(highs) / min(values) + 1
    for _ in range(_BISECTIONS):
        middle = (left + right) / 2
        if middle in (left, right):
            break
        if mean(rates_at(middle)) < target:
            left = middle
        else:
            right = middle
    return rates_at(right)


def integer_counts(modules: Sequence[ModuleShape], rates: Sequence[float], target: float) -> list[int]:
    """Zeros per row of each module, the rounding residue carried from module to module (error diffusion).

    The zeros of the whole model miss ``target`` by less than one row-unit (one zero in every row of one module).

    Raises:
        UserError: the target needs rows without any weight left.
    """
    wanted_total = target * sum(module.size for module in modules)
    counts: list[int] = []
    carry = 0.0
    for module, rate in zip(modules, rates, strict=True):
        exact = rate * module.size + carry
        count = min(max(math.floor(exact / module.rows + 0.5), 0), max(module.columns - 1, 0))
        counts.append(count)
        carry = exact - count * module.rows
    # Modules at a bound pass their residue on; what is left at the end goes back to whoever has room.
    carry = wanted_total - sum(count * module.rows for count, module in zip(counts, modules, strict=True))
    for at, module in enumerate(modules):
        step = math.floor(abs(carry) / module.rows + 0.5) * (1 if carry > 0 else -1)
        count = min(max(counts[at] + step, 0), max(module.columns - 1, 0))
        carry -= (count - counts[at]) * module.rows
        counts[at] = count
    if abs(carry) >= max(module.rows for module in modules):
        raise UserError(
            f"sparsity {target:g} would leave rows without any weight",
            "Choose a lower sparsity for layers this narrow.",
        )
    return counts


def plan_from_allocation(
    allocated: Allocation,
    layers: list[list[ModuleShape]],
    sparsity: float,
    *,
    allocation: str,
    pattern: NM | None = None,
    options: Mapping[str, Any] | None = None,
    model_sha256: str | None = None,
) -> SparsityPlan:
    """Make the plan: rates by :func:`meet_target`, counts by :func:`integer_counts`, or one N:M for all modules.

    Raises:
        UserError: a target that cannot be met, or an N:M pattern with an allocator that wants unequal rates.
    """
    check_sparsity(sparsity)
    modules = [module for layer in layers for module in layer]
    if pattern is not None:
        if any(unit.value != allocated.units[0].value for unit in allocated.units):
            raise unequal_rates(allocation, pattern)
        targets = tuple(nm_target(module, pattern) for module in modules)
    else:
        rates = module_rates(allocated, modules, sparsity)
        counts = integer_counts(modules, rates, sparsity)
        targets = tuple(
            ModuleTarget(module.name, module.rows, module.columns, count)
            for module, count in zip(modules, counts, strict=True)
        )
    return SparsityPlan(
        sparsity=sparsity,
        pattern=str(pattern) if pattern else "unstructured",
        allocation=allocation,
        targets=targets,
        options=dict(options or {}),
        model_sha256=model_sha256,
        details=allocated.details or {},
    )


def unequal_rates(allocation: str, pattern: NM) -> UserError:
    """The refusal of a fixed pattern for an allocation that wants unequal rates."""
    return UserError(
        f"allocation {allocation} gives unequal rates, which the fixed pattern {pattern} cannot hold",
        f"Use --allocation uniform, or --pattern mixed-{pattern}.",
    )


def unit_sizes(allocated: Allocation, modules: Sequence[ModuleShape]) -> list[int]:
    """The weights of each unit."""
    size_of = {module.name: module.size for module in modules}
    return [sum(size_of[name] for name in unit.modules) for unit in allocated.units]


def module_rates(allocated: Allocation, modules: Sequence[ModuleShape], sparsity: float) -> list[float]:
    """The rate of each module, in the order of ``modules``."""
    rates = meet_target(
        [unit.value for unit in allocated.units], unit_sizes(allocated, modules), sparsity, rule=allocated.rule
    )
    rate_of = {name: rate for unit, rate in zip(allocated.units, rates, strict=True) for name in unit.modules}
    return [rate_of[module.name] for module in modules]


def nm_target(module: ModuleShape, pattern: NM) -> ModuleTarget:
    """The target of one module under an N:M pattern.

    Raises:
        UserError: its inputs are not divisible by M.
    """
    zeros = module.columns // pattern.m * (pattern.m - pattern.n)
    return ModuleTarget(module.name, module.rows, module.columns, zeros, pattern)
