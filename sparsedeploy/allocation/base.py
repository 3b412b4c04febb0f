"""What every allocator is: measure each layer of the dense model, then say how far each unit should leave the average.

``measure`` sees one layer at a time, so nothing of a model's size is ever kept; ``shares`` sees only the numbers.
Neither prunes: :mod:`sparsedeploy.allocation.budget` turns the answer into integer counts that meet the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from sparsedeploy.calibration.driver import LayerView
from sparsedeploy.plan import ModuleShape
from sparsedeploy.registry import Registry


@dataclass(frozen=True)
class Unit:
    """Modules that share one sparsity rate, and what the allocator says of them.

    Attributes:
        modules: full module names.
        value: with rule ``additive`` the deviation from the target rate; with ``multiplicative`` the rate's factor.
    """

    modules: tuple[str, ...]
    value: float


@dataclass(frozen=True)
class Shares:
    """An allocator's answer before the budget is met.

    Attributes:
        units: every prunable module in exactly one unit, in model order.
        rule: how ``Unit.value`` becomes a rate (methods 1.7).
        details: the measurements behind it, plain numbers, for plots and reports.
    """

    units: tuple[Unit, ...]
    rule: Literal["additive", "multiplicative"] = "additive"
    details: dict[str, Any] | None = None


class Allocator(Protocol):
    """An allocation method; ``__init__(options)``."""

    def measure(self, layer: LayerView) -> Any:
        """Reduce one layer of the dense model to a few numbers."""

    def shares(self, measured: list[Any], layers: list[list[ModuleShape]], sparsity: float) -> Shares:
        """Turn the layers' measurements into deviations around ``sparsity``.

        Args:
            measured: what :meth:`measure` returned, by depth.
            layers: the modules of each layer, by depth.
            sparsity: the global target, in [0, 1).
        """


ALLOCATORS: Registry[Any] = Registry("allocation method")


def layer_units(layers: list[list[ModuleShape]], values: list[float]) -> tuple[Unit, ...]:
    """One unit per decoder layer."""
    return tuple(
        Unit(tuple(module.name for module in layer), float(value)) for layer, value in zip(layers, values, strict=True)
    )


def centred_range(scores: list[float], strength: float) -> list[float]:
    """Density deviations spanning ``2 * strength`` around their mean, rising with the score (OWL, DLP, LSA).

    d = 2 * strength * (x - min) / (max - min); returns d - mean(d). All zero when the scores are equal.
    """
    low, high = min(scores), max(scores)
    if high == low:
        return [0.0] * len(scores)
    scaled = [2 * strength * (score - low) / (high - low) for score in scores]
    mean = sum(scaled) / len(scaled)
    return [value - mean for value in scaled]
