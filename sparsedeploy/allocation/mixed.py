"""Mixed N:M: each unit keeps its own N of every M, the average is met exactly."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from sparsedeploy.allocation.base import Allocation, check_scores
from sparsedeploy.allocation.budget import meet_target, nm_target, unit_sizes
from sparsedeploy.calibration.driver import LayerContext
from sparsedeploy.calibration.scores import wanda_score_blocks
from sparsedeploy.errors import UserError
from sparsedeploy.options import Options, option
from sparsedeploy.plan import NM, MixedNM, ModuleShape, SparsityPlan


@dataclass(frozen=True)
class MixedOptions(Options):
    """How a mixed N:M pattern chooses its N."""

    rule: Literal["apportion", "marginal"] = option(
        "apportion",
        "`apportion` gives each unit the N that its importance asks for; `marginal` takes from the unit that loses "
        "least of its Wanda scores, step by step (after DominoSearch).",
    )
    wanted: Literal["importance", "rates"] = option(
        "importance",
        "Where `apportion` takes the desired N from: the allocator's `importance`, or M (1 - s) of its `rates`.",
    )
    strength: float = option(
        2.0,
        "The desired N spans `strength` steps between the least and the most important unit; with `marginal`, costs "
        "are weighted by exp(strength (z - mean z)), z the importance scaled to [0, 1].",
        at_least=0,
    )
    n_min: int = option(1, "The smallest N.", at_least=1)
    n_max: int | None = option(None, "The largest N; None is M.", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_max is not None and self.n_max < self.n_min:
            raise ValueError("n_max must be at least n_min")


def mixed_plan(
    allocated: Allocation,
    layers: list[list[ModuleShape]],
    pattern: MixedNM,
    *,
    allocation: str,
    mixed: MixedOptions | None = None,
    costs: Mapping[str, torch.Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    model_sha256: str | None = None,
) -> SparsityPlan:
    """The plan of a mixed pattern: N per unit of ``allocated``.

    Args:
        costs: with rule ``marginal``, each module's :func:`step_costs`.

    Raises:
        UserError: an average outside the bounds, or modules whose inputs M does not divide.
    """
    mixed = mixed or MixedOptions()
    modules = [module for layer in layers for module in layer]
    sizes = unit_sizes(allocated, modules)
    low, high = mixed_bounds(mixed, pattern.m)
    if mixed.rule == "marginal":
        assert costs is not None
        spread = desired_counts(allocated.importance, sizes, 0.0, mixed.strength)
        counts = cheapest_counts(
            [_relative([costs[name] for name in unit.modules]) for unit in allocated.units],
            sizes,
            pattern.keep,
            low=low,
            high=high,
            weights=[math.exp(value) for value in spread],
        )
    else:
        if mixed.wanted == "importance":
            wanted = desired_counts(allocated.importance, sizes, pattern.keep, mixed.strength)
        else:
            rates = meet_target([u.value for u in allocated.units], sizes, pattern.sparsity, rule=allocated.rule)
            wanted = [pattern.m * (1 - rate) for rate in rates]
        counts = apportion(wanted, sizes, pattern.keep, low=low, high=high)
    n_of = {name: n for unit, n in zip(allocated.units, counts, strict=True) for name in unit.modules}
    return SparsityPlan(
        sparsity=pattern.sparsity,
        pattern=str(pattern),
        allocation=allocation,
        targets=tuple(nm_target(module, NM(n_of[module.name], pattern.m)) for module in modules),
        options=dict(options or {}),
        model_sha256=model_sha256,
        details={**(allocated.details or {}), "mixed": asdict(mixed), "kept": counts},
    )


def mixed_bounds(mixed: MixedOptions, m: int) -> tuple[int, int]:
    """The smallest and the largest N of every ``m``."""
    return mixed.n_min, m if mixed.n_max is None else min(mixed.n_max, m)


def desired_counts(importance: Sequence[float], sizes: Sequence[int], average: float, strength: float) -> list[float]:
    """average + strength * (z - mean z): z is the importance scaled to [0, 1], its mean weighted by size.

    All ``average`` when the importances are equal.
    """
    check_scores(importance)
    lowest, highest = min(importance), max(importance)
    if highest == lowest:
        return [average] * len(importance)
    scaled = [(value - lowest) / (highest - lowest) for value in importance]
    mean = math.fsum(size * z for size, z in zip(sizes, scaled, strict=True)) / sum(sizes)
    return [average + strength * (z - mean) for z in scaled]


def apportion(
    wanted: Sequence[float],
    sizes: Sequence[int],
    average: float,
    *,
    low: Sequence[int] | int,
    high: Sequence[int] | int,
) -> list[int]:
    """Whole numbers near the desired counts, within bounds, whose size-weighted sum is the budget.

    The desired counts are shifted by one constant to meet the budget within the bounds and rounded down; the rest is
    handed out by largest remainder. For units of equal size the budget is round(average * units) steps and is met
    exactly; otherwise less than one step of the largest unit stays unspent. Never overspent.

    Args:
        wanted: the desired N of each unit.
        low, high: bounds of N, for all or one per unit.

    Raises:
        UserError: the bounds cannot meet the average.
    """
    lows, highs = _bounds(sizes, average, low, high)
    budget = _budget(sizes, average)
    shifted = meet_target(
        [wish - average for wish in wanted], sizes, budget / sum(sizes), low=_floats(lows), high=_floats(highs)
    )
    counts = [math.floor(value + 1e-9) for value in shifted]
    left = budget - sum(size * count for size, count in zip(sizes, counts, strict=True))
    remainder = [round(value - count, 9) for value, count in zip(shifted, counts, strict=True)]
    for unit in sorted(range(len(sizes)), key=lambda u: (-remainder[u], -wanted[u], u)):
        if counts[unit] < highs[unit] and sizes[unit] <= left:
            counts[unit] += 1
            left -= sizes[unit]
    return counts


def cheapest_counts(
    costs: Sequence[Sequence[float]],
    sizes: Sequence[int],
    average: float,
    *,
    low: Sequence[int] | int,
    high: Sequence[int] | int,
    weights: Sequence[float] | None = None,
) -> list[int]:
    """From the upper bounds down, the step that costs least per weight goes first, until the budget is met (6.2).

    Optimal for units of equal size, since a unit's steps cost more and more.

    Args:
        costs: ``costs[u][n - 1]`` is what unit u loses by going from n to n - 1 kept.
        weights: factors of each unit's costs.

    Raises:
        UserError: the bounds cannot meet the average, or costs that are not finite.
    """
    lows, highs = _bounds(sizes, average, low, high)
    budget = _budget(sizes, average)
    factor = [1.0] * len(sizes) if weights is None else list(weights)
    for unit_costs in costs:
        check_scores(unit_costs)
    counts = list(highs)
    spent = sum(size * count for size, count in zip(sizes, counts, strict=True))

    def price(unit: int) -> tuple[float, int]:
        return factor[unit] * costs[unit][counts[unit] - 1] / sizes[unit], unit

    heap = [price(unit) for unit in range(len(sizes)) if counts[unit] > lows[unit]]
    heapq.heapify(heap)
    while spent > budget:
        _, unit = heapq.heappop(heap)
        counts[unit] -= 1
        spent -= sizes[unit]
        if counts[unit] > lows[unit]:
            heapq.heappush(heap, price(unit))
    # With unequal sizes the last step may have saved too much: give back what fits, the dearest first.
    for unit in sorted(range(len(sizes)), key=lambda u: -factor[u] * _next_cost(costs[u], counts[u]) / sizes[u]):
        if counts[unit] < highs[unit] and spent + sizes[unit] <= budget:
            counts[unit] += 1
            spent += sizes[unit]
    return counts


def step_costs(blocks: Iterable[torch.Tensor], m: int) -> torch.Tensor:
    """What keeping one weight fewer of every ``m`` loses: entry n - 1 is the sum of the squared n-th largest scores.

    Args:
        blocks: scores ``[rows, columns]``, not negative, in blocks of rows.

    Returns:
        float64 ``[m]``, not increasing; its sum is the squared total.

    Raises:
        UserError: columns that ``m`` does not divide.
    """
    total = torch.zeros(m, dtype=torch.float64)
    for scores in blocks:
        if scores.shape[1] % m:
            raise UserError(f"{scores.shape[1]} inputs are not divisible by {m}", "Choose an M that divides them.")
        ordered = scores.reshape(-1, m).sort(dim=1, descending=True).values
        total += ordered.square().sum(dim=0, dtype=torch.float64).cpu()
    return total


def layer_step_costs(layer: LayerContext, m: int) -> dict[str, torch.Tensor]:
    """:func:`step_costs` of the Wanda scores of each linear of a layer, by name."""
    return {
        name: step_costs(wanda_score_blocks(linear.weight, layer.statistics[name].mean_square), m)
        for name, linear in layer.linears.items()
    }


def _relative(costs: Sequence[torch.Tensor]) -> list[float]:
    """A unit's step costs as fractions of its squared total; zero for a unit without any score."""
    total = torch.stack(list(costs)).sum(dim=0)
    whole = total.sum()
    return (total / whole if whole != 0 else total).tolist()


def _next_cost(costs: Sequence[float], count: int) -> float:
    return costs[count] if count < len(costs) else 0.0


def _budget(sizes: Sequence[int], average: float) -> float:
    """The weighted sum of N to reach: whole steps when all units have one size."""
    if len(set(sizes)) == 1:
        return float(round(average * len(sizes)) * sizes[0])
    return math.floor(average * sum(sizes) + 1e-6)


def _bounds(
    sizes: Sequence[int], average: float, low: Sequence[int] | int, high: Sequence[int] | int
) -> tuple[list[int], list[int]]:
    lows = [low] * len(sizes) if isinstance(low, int) else list(low)
    highs = [high] * len(sizes) if isinstance(high, int) else list(high)
    budget = _budget(sizes, average)
    least, most = (sum(s * n for s, n in zip(sizes, bound, strict=True)) for bound in (lows, highs))
    if min(lows) < 1 or any(a > b for a, b in zip(lows, highs, strict=True)) or not least <= budget <= most:
        total = sum(sizes)
        raise UserError(
            f"an average of {average:g} kept cannot be met with N from {least / total:g} to {most / total:g}",
            "Choose an average within them, or other bounds (pattern options n_min, n_max).",
        )
    return lows, highs


def _floats(values: Sequence[int]) -> list[float]:
    return [float(value) for value in values]
