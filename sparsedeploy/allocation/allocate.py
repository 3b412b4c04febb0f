"""Measure a dense model once with an allocator and make the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.allocation.base import Needs, sequences_read
from sparsedeploy.allocation.budget import plan_from_allocation, unequal_rates
from sparsedeploy.allocation.mixed import MixedOptions, layer_step_costs, mixed_plan
from sparsedeploy.calibration.driver import LayerContext, LayerDriver, as_source, iterate_weights
from sparsedeploy.calibration.statistics import Kind
from sparsedeploy.errors import UserError
from sparsedeploy.models.layers import LayerSource
from sparsedeploy.plan import NM, MixedNM, ModuleShape, SparsityPlan
from sparsedeploy.processes import SINGLE_PROCESS, Processes
from sparsedeploy.registry import ALLOCATORS

T = TypeVar("T")
# Each provides what those before it read.
_ORDER: tuple[Needs, ...] = ("none", "weights", "inputs", "sum_squares", "hessian")
_STATISTICS: dict[Needs, Kind] = {"inputs": "none", "sum_squares": "sum_squares", "hessian": "hessian"}


def allocate(
    model: nn.Module | LayerSource,
    tokens: torch.Tensor | None,
    sparsity: float,
    pattern: NM | MixedNM | None,
    allocation: str,
    options: Any,
    *,
    mixed: MixedOptions | None = None,
    model_sha256: str | None = None,
    batch_size: int | None = None,
    accumulate: torch.dtype = torch.float32,
    processes: Processes = SINGLE_PROCESS,
) -> SparsityPlan:
    """Measure the dense model, layer by layer in one pass, and meet the budget; the model is not changed.

    Args:
        tokens: calibration sequences int64 ``[sequences, length]``; None for allocations that need none.
        sparsity: the target; for a pattern, the pattern's own.
        options: of the allocation.
        mixed: how a mixed pattern chooses its N.

    Raises:
        UserError: a target or pattern that the allocation or the shapes cannot meet, or values that are not finite.
    """
    return allocate_each(
        model,
        tokens,
        sparsity,
        pattern,
        {allocation: options},
        mixed=mixed,
        model_sha256=model_sha256,
        batch_size=batch_size,
        accumulate=accumulate,
        processes=processes,
    )[allocation]


def allocate_each(
    model: nn.Module | LayerSource,
    tokens: torch.Tensor | None,
    sparsity: float,
    pattern: NM | MixedNM | None,
    allocations: Mapping[str, Any],
    *,
    mixed: MixedOptions | None = None,
    model_sha256: str | None = None,
    batch_size: int | None = None,
    accumulate: torch.dtype = torch.float32,
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, SparsityPlan]:
    """The plans of several allocations, by name, measured in one pass that they share; see :func:`allocate`.

    Args:
        allocations: name -> options.
    """
    measured = measure_each(
        model,
        tokens,
        pattern,
        allocations,
        mixed=mixed,
        batch_size=batch_size,
        accumulate=accumulate,
        processes=processes,
    )
    return {name: measured.plan(name, sparsity, model_sha256) for name in allocations}


@dataclass(frozen=True)
class Measured:
    """What one pass over the dense model gave to some allocations, for plans of any rate.

    Attributes:
        allocations: name -> options.
        found: by name, what each layer was reduced to.
        costs: of mixed patterns.
    """

    layers: list[list[ModuleShape]]
    pattern: NM | MixedNM | None
    mixed: MixedOptions | None
    allocations: Mapping[str, Any]
    found: Mapping[str, list[Any]]
    costs: Mapping[str, torch.Tensor]

    def plan(self, name: str, sparsity: float, model_sha256: str | None = None) -> SparsityPlan:
        """The plan of an allocation at a rate.

        Raises:
            UserError: a target or pattern that the allocation or the shapes cannot meet.
        """
        options = self.allocations[name]
        allocated = ALLOCATORS.get(name).function(options).allocate(self.found[name], self.layers, sparsity)
        known: dict[str, Any] = {"allocation": name, "options": asdict(options), "model_sha256": model_sha256}
        if isinstance(self.pattern, MixedNM):
            return mixed_plan(allocated, self.layers, self.pattern, mixed=self.mixed, costs=self.costs, **known)
        return plan_from_allocation(allocated, self.layers, sparsity, pattern=self.pattern, **known)


def measure_each(
    model: nn.Module | LayerSource,
    tokens: torch.Tensor | None,
    pattern: NM | MixedNM | None,
    allocations: Mapping[str, Any],
    *,
    mixed: MixedOptions | None = None,
    batch_size: int | None = None,
    accumulate: torch.dtype = torch.float32,
    processes: Processes = SINGLE_PROCESS,
) -> Measured:
    """Measure the dense model once for several allocations; see :func:`allocate`."""
    methods = {name: ALLOCATORS.get(name) for name in allocations}
    for name, options in allocations.items():
        check_pattern(name, options, pattern)
    reading = {
        name: method.function(allocations[name]) for name, method in methods.items() if method.traits["needs"] != "none"
    }
    layers = model_layers(model)
    marginal = isinstance(pattern, MixedNM) and mixed is not None and mixed.rule == "marginal"
    costs: dict[str, torch.Tensor] = {}

    def reduce(layer: LayerContext) -> dict[str, Any]:
        if marginal:
            assert isinstance(pattern, MixedNM)
            costs.update(layer_step_costs(layer, pattern.m))
        return {name: allocator.measure(layer) for name, allocator in reading.items()}

    reads = effective_needs(*(method.traits["needs"] for method in methods.values()), marginal=marginal)
    if reads == "inputs" and tokens is not None and len(reading) == 1:  # nothing else looks at what it leaves out
        (name,) = reading
        tokens = tokens[: sequences_read(methods[name], allocations[name])]
    by_layer: list[dict[str, Any]] = [{}] * len(layers)
    if reads != "none":
        by_layer = measure_layers(
            model,
            tokens,
            reads,
            reduce,
            name=", ".join(allocations) if len(allocations) < 3 else f"{len(allocations)} allocations",
            batch_size=batch_size,
            accumulate=accumulate,
            processes=processes,
        )
    found = {name: [measured.get(name) for measured in by_layer] for name in allocations}
    return Measured(layers, pattern, mixed, allocations, found, costs)


def check_pattern(allocation: str, options: Any, pattern: NM | MixedNM | None) -> None:
    """Refuse, before anything is measured, a fixed N:M with an allocation that is not uniform.

    Raises:
        UserError: see above.
    """
    strength = ALLOCATORS.get(allocation).traits["strength"]
    if isinstance(pattern, NM) and strength is not None and getattr(options, strength) != 0:
        raise unequal_rates(allocation, pattern)


def effective_needs(*needs: Needs, marginal: bool) -> Needs:
    """What one pass must provide for all: marginal costs of mixed patterns read input norms besides."""
    return max((*needs, "sum_squares" if marginal else "none"), key=_ORDER.index)


@torch.no_grad()
def measure_layers(
    model: nn.Module | LayerSource,
    tokens: torch.Tensor | None,
    needs: Needs,
    reduce: Callable[[LayerContext], T],
    *,
    name: str,
    batch_size: int | None = None,
    accumulate: torch.dtype = torch.float32,
    processes: Processes = SINGLE_PROCESS,
) -> list[T]:
    """Apply ``reduce`` to each decoder layer of the dense model, in one pass; only its results are kept.

    Raises:
        UserError: no tokens where ``needs`` wants them, or weights or activations that are not finite.
    """
    if needs in ("none", "weights"):
        walk = iterate_weights(as_source(model))
        return [reduce(layer) for layer in progress.track(walk, f"allocate ({name})", unit="layers")]
    if tokens is None:
        raise UserError(f"allocation {name} needs calibration text and none was given", "Add --data.")
    # Whoever compares whole sequences with each other needs all of them; statistics of inputs add up.
    shared = SINGLE_PROCESS if needs == "inputs" else processes
    driver = LayerDriver(model, tokens, batch_size=batch_size, accumulate=accumulate, processes=shared)
    results: list[T] = []
    with progress.bar(f"allocate ({name})", len(driver), "layers") as advance:
        for layer in driver.iterate(_STATISTICS[needs], changes_weights=False):
            results.append(reduce(layer))
            advance()
    return results


def model_layers(model: nn.Module | LayerSource) -> list[list[ModuleShape]]:
    """The shapes of the prunable linears, layer by layer, and of the output head where it counts."""
    stack = as_source(model).stack
    return [
        [ModuleShape(name, linear.out_features, linear.in_features) for name, linear in stack.linears(index).items()]
        for index in range(len(stack))
    ]
