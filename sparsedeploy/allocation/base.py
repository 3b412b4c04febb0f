"""What every allocator is: measure each layer of the dense model, then say how far each unit should leave the average.

``measure`` sees one layer at a time, so nothing of a model's size is ever kept; ``allocate`` sees only the numbers.
Neither prunes: :mod:`sparsedeploy.allocation.budget` turns the answer into integer counts that meet the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from sparsedeploy.calibration.driver import LayerContext
from sparsedeploy.calibration.scores import wanda_score_blocks
from sparsedeploy.errors import UserError
from sparsedeploy.plan import NM, MixedNM, ModuleShape, SparsityPlan
from sparsedeploy.registry import Method

# What an allocator reads of each layer: nothing but its depth, its weights, the hidden states that enter and leave it,
# or statistics of each linear's inputs.
Needs = Literal["none", "weights", "inputs", "sum_squares", "hessian"]

# The strength by target sparsity that DLP publishes and LSA ships for DLP and for its own layer mode.
_STRENGTHS = {1: 0.06, 2: 0.02, 3: 0.04, 4: 0.02, 5: 0.04, 6: 0.10, 7: 0.15, 8: 0.12}


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
class Allocation:
    """An allocator's answer before the budget is met.

    Attributes:
        units: every prunable module in exactly one unit, in model order.
        rule: how ``Unit.value`` becomes a rate.
        details: the measurements behind it, plain numbers, for plots and reports.
        window: how far a rate may lie from the target, where that bounds the rates.
        ranking: one importance per unit (higher keeps more) where the deviations do not tell it, because they are
            bang-bang or scaled by size; mixed N:M patterns are chosen from it.
    """

    units: tuple[Unit, ...]
    rule: Literal["additive", "multiplicative"] = "additive"
    details: dict[str, Any] | None = None
    ranking: tuple[float, ...] | None = None
    window: float | None = None

    @property
    def importance(self) -> tuple[float, ...]:
        """Higher keeps more: the ranking, or minus the deviation or factor."""
        return self.ranking if self.ranking is not None else tuple(-unit.value for unit in self.units)


@dataclass(frozen=True)
class Search:
    """What an allocation that searches may use.

    Attributes:
        sparsity, pattern: the target.
        layers: the modules of each layer, by depth.
        plan_with: options -> the plan that the method makes with them; a second argument names another method.
        trial_on: (text, split, windows) -> a trial, which prunes a copy of the model by a plan and returns its
            perplexity on that text, infinite where the model diverged. A text of None is the calibration's own.
    """

    sparsity: float
    pattern: NM | MixedNM | None
    layers: list[list[ModuleShape]]
    plan_with: Callable[..., SparsityPlan]
    trial_on: Callable[[str | None, str, int], Callable[[SparsityPlan], float]]


class Allocator(Protocol):
    """An allocation method; ``__init__(options)``.

    Its traits: ``needs`` (:data:`Needs`); ``strength``, the name of the option that makes the allocation uniform at 0
    (None for a method that always is); where it reads only some of the sequences, ``sequences``, the name of the option
    that says how many; and where it searches by pruning, ``searches``: true, or a function of the options.
    """

    def measure(self, layer: LayerContext) -> Any:
        """Reduce one layer of the dense model to a few numbers; not called with ``needs="none"``."""

    def allocate(self, measured: list[Any], layers: list[list[ModuleShape]], sparsity: float) -> Allocation:
        """Turn the layers' measurements into deviations around ``sparsity``.

        Args:
            measured: what :meth:`measure` returned, by depth; one None per layer with ``needs="none"``.
            layers: the modules of each layer, by depth.
            sparsity: the global target, in [0, 1).
        """

    def search(self, search: Search) -> tuple[SparsityPlan, dict[str, Any]]:
        """The best plan that was tried, and what the trials showed, as plain data; only with ``searches``."""
        raise NotImplementedError


# An allocation method, called with its options; ``search`` is only asked for where the trait says so.
MakeAllocator = Callable[[Any], Any]


def sequences_read(method: Method[MakeAllocator], options: Any) -> int | None:
    """How many of the calibration sequences an allocation reads; None for all."""
    name = method.traits.get("sequences")
    return getattr(options, name) if name else None


def layer_scores(layer: LayerContext) -> Iterator[torch.Tensor]:
    """The Wanda scores of all of a layer's linears, block by block; their order and sizes are always the same."""
    for name, linear in layer.linears.items():
        yield from wanda_score_blocks(linear.weight, layer.statistics[name].mean_square)


def layer_units(layers: list[list[ModuleShape]], values: Sequence[float]) -> tuple[Unit, ...]:
    """One unit per decoder layer."""
    return tuple(
        Unit(tuple(module.name for module in layer), float(value)) for layer, value in zip(layers, values, strict=True)
    )


def module_units(layers: list[list[ModuleShape]], values: Sequence[float]) -> tuple[Unit, ...]:
    """One unit per linear; ``values`` in model order."""
    modules = [module for layer in layers for module in layer]
    return tuple(Unit((module.name,), float(value)) for module, value in zip(modules, values, strict=True))


def check_scores(scores: Sequence[float]) -> None:
    """Refuse scores that are not finite: comparisons with NaN would give an arbitrary allocation.

    Raises:
        UserError: naming the first one.
    """
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise UserError(
                f"the allocation score of unit {index} is {score}",
                "Check the checkpoint and the calibration text, or use --allocation uniform.",
            )


def centred_range(scores: Sequence[float], strength: float) -> list[float]:
    """Density deviations spanning ``2 * strength`` around their mean, rising with the score (OWL, DLP, LSA).

    d = 2 * strength * (x - min) / (max - min); returns d - mean(d). All zero when the scores are equal.

    Raises:
        UserError: scores that are not finite.
    """
    check_scores(scores)
    low, high = min(scores), max(scores)
    if high == low:
        return [0.0] * len(scores)
    scaled = [2 * strength * (score - low) / (high - low) for score in scores]
    mean = math.fsum(scaled) / len(scaled)
    return [value - mean for value in scaled]


def tabulated_strength(sparsity: float) -> float:
    """The published strength for a target, by the tenth it lies in (0.7 <= s < 0.8 -> 0.15).

    Below 0.1 and from 0.9 on, where the reference code has no entry, the nearest one.
    """
    return _STRENGTHS[min(max(math.floor(10 * sparsity + 1e-9), 1), 8)]
