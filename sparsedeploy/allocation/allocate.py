"""Measure a dense model once with an allocator and make the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.allocation.base import Needs, sequences_read
from sparsedeploy.allocation.budget import plan_from_shares, unequal_rates
from sparsedeploy.allocation.mixed import MixedOptions, layer_step_costs, mixed_plan
from sparsedeploy.calibration.driver import LayerContext, LayerDriver, as_source, iterate_weights
from sparsedeploy.calibration.statistics import Kind, richest
from sparsedeploy.errors import UserError
from sparsedeploy.models.layers import LayerSource
from sparsedeploy.plan import NM, MixedNM, ModuleShape, SparsityPlan
from sparsedeploy.processes import SINGLE_PROCESS, Processes
from sparsedeploy.registry import ALLOCATORS

T = TypeVar("T")
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
    method = ALLOCATORS.get(allocation)
    check_pattern(allocation, options, pattern)
    allocator = method.function(options)
    needs: Needs = method.traits["needs"]
    layers = model_layers(model)
    marginal = isinstance(pattern, MixedNM) and mixed is not None and mixed.rule == "marginal"
    costs: dict[str, torch.Tensor] = {}

    def reduce(layer: LayerContext) -> Any:
        if marginal:
            assert isinstance(pattern, MixedNM)
            costs.update(layer_step_costs(layer, pattern.m))
        return None if needs == "none" else allocator.measure(layer)

    reads = effective_needs(needs, marginal=marginal)
    if reads == "inputs" and tokens is not None:  # nothing else looks at the sequences that the method leaves out
        tokens = tokens[: sequences_read(method, options)]
    measured: list[Any] = [None] * len(layers)
    if reads != "none":
        measured = measure_layers(
            model,
            tokens,
            reads,
            reduce,
            name=allocation,
            batch_size=batch_size,
            accumulate=accumulate,
            processes=processes,
        )
    shares = allocator.shares(measured, layers, sparsity)
    if isinstance(pattern, MixedNM):
        return mixed_plan(
            shares,
            layers,
            pattern,
            allocation=allocation,
            mixed=mixed,
            costs=costs,
            options=asdict(options),
            model_sha256=model_sha256,
        )
    return plan_from_shares(
        shares,
        layers,
        sparsity,
        allocation=allocation,
        pattern=pattern,
        options=asdict(options),
        model_sha256=model_sha256,
    )


def check_pattern(allocation: str, options: Any, pattern: NM | MixedNM | None) -> None:
    """Refuse, before anything is measured, a fixed N:M with an allocation that is not uniform.

    Raises:
        UserError: see above.
    """
    strength = ALLOCATORS.get(allocation).traits["strength"]
    if isinstance(pattern, NM) and strength is not None and getattr(options, strength) != 0:
        raise unequal_rates(allocation, pattern)


def effective_needs(needs: Needs, *, marginal: bool) -> Needs:
    """What one pass must provide: marginal costs of mixed patterns read input norms besides."""
    if not marginal:
        return needs
    return "hessian" if richest(_STATISTICS.get(needs, "none"), "sum_squares") == "hessian" else "sum_squares"


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
        raise UserError(f"allocation {name} measures calibration text and none was given", "Add --data.")
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
    """The shapes of the prunable linears, layer by layer."""
    stack = as_source(model).stack
    return [
        [ModuleShape(name, linear.out_features, linear.in_features) for name, linear in stack.linears(index).items()]
        for index in range(len(stack.layers))
    ]
