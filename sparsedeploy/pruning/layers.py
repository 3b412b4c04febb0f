"""Prune a model layer by layer: the loop that every pruner runs in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.calibration.driver import LayerContext, LayerDriver, iterate_weights
from sparsedeploy.calibration.statistics import InputStatistics, Kind
from sparsedeploy.errors import UserError
from sparsedeploy.grid import Grid
from sparsedeploy.memory import return_freed_memory
from sparsedeploy.models.layers import LayerSource, ResidentLayers
from sparsedeploy.models.linear_views import PrunableLinear, assign_weight
from sparsedeploy.plan import ModuleShape, ModuleTarget, SparsityPlan
from sparsedeploy.processes import SINGLE_PROCESS, Processes
from sparsedeploy.pruning.base import Pruned, Pruner
from sparsedeploy.pruning.least_squares import reconstructed, shared_hessian
from sparsedeploy.pruning.rounding import rounded
from sparsedeploy.pruning.sweep import DAMPING, shared_factor
from sparsedeploy.registry import PRUNERS, Method


@dataclass(frozen=True)
class PrunedLayer:
    """One finished layer.

    Attributes:
        index: its depth.
        modules: by full name, until the next layer is asked for; so long the weights are in the model, too.
    """

    index: int
    modules: dict[str, Pruned]


@torch.no_grad()
def prune_layers(
    source: LayerSource,
    tokens: torch.Tensor | None,
    plan: SparsityPlan,
    method: str,
    options: Any,
    *,
    batch_size: int | None = None,
    accumulate: torch.dtype = torch.float32,
    processes: Processes = SINGLE_PROCESS,
    stored: dict[str, torch.dtype] | None = None,
    finished: int = 0,
    reconstruct: bool = False,
    grid: Grid | None = None,
    masks: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[PrunedLayer]:
    """Prune in place, each layer on the inputs that the pruned layers before it give, and yield what was done.

    Args:
        tokens: calibration sequences int64 ``[sequences, length]``; None for methods that need none.
        batch_size, accumulate, processes: see :class:`~sparsedeploy.calibration.driver.LayerDriver`. With several
            processes the linears of a layer are dealt out to be solved, and everyone gets all results.
        stored: the type that each module's weight will be stored in, where it differs from the one computed in: the
            layers that follow see the stored values.
        finished: layers before this one are pruned already and only run.
        reconstruct: give each mask its least-squares weights, whatever the method left.
        grid: what kept weights are rounded to.
        masks: of a model that is pruned already: nothing is chosen, and its weights are only rounded.

    Raises:
        UserError: a plan for other modules, no tokens for a method that needs them, or weights or activations that
            are not finite.
    """
    pruner = PRUNERS.get(method)
    needs: Kind = "hessian" if reconstruct or grid else pruner.traits["needs"]
    stack = source.stack
    plan.check_modules([ModuleShape(name, m.out_features, m.in_features) for name, m in stack.all_linears().items()])
    targets = plan.by_name
    if needs == "none":
        layers = iterate_weights(source, finished=finished)
    elif tokens is None:
        what = "--reconstruct" if reconstruct else "--quantize" if grid else method
        raise UserError(f"{what} needs calibration text and none was given", "Add --data.")
    else:
        driver = LayerDriver(source, tokens, batch_size=batch_size, accumulate=accumulate, processes=processes)
        layers = driver.iterate(needs, changes_weights=True, finished=finished)
    with progress.bar(f"prune ({method})", len(stack), "layers") as advance:
        advance(finished)
        modules: dict[str, Pruned] = {}
        for layer in layers:
            owners = assign(layer, processes.count)
            for name, linear in layer.linears.items():
                if owners[name] == processes.index:
                    statistics = layer.statistics.get(name)
                    if masks is None:
                        found = prune_linear(pruner, linear, statistics, targets[name], options, reconstruct, grid)
                    else:
                        assert grid is not None and statistics is not None  # noqa: PT018
                        mask = masks[name].to(linear.weight.device)
                        _check_mask(name, mask, linear.weight.data, targets[name])
                        found = rounded(Pruned(mask, linear.weight.data), None, statistics, targets[name], grid)
                    modules[name] = found
                    del statistics
                    _replace(linear, modules[name].weight, stored[name] if stored else None)
                _release(layer.statistics, name)
            for name, linear in layer.linears.items():
                kind = torch.float32 if grid is not None else linear.weight.dtype
                pruned = modules[name] = _shared(modules.get(name), linear.weight, kind, owners[name], processes)
                if pruned.mask.numel() - int(torch.count_nonzero(pruned.mask)) != targets[name].zeros:
                    raise RuntimeError(f"{method} pruned another number of weights of {name} than planned")
                if owners[name] != processes.index:
                    _replace(linear, pruned.weight, stored[name] if stored else None)
            yield PrunedLayer(layer.index, modules)
            modules.clear()
            advance()


def prune_linear(
    pruner: Method[Pruner],
    linear: PrunableLinear,
    statistics: InputStatistics | None,
    target: ModuleTarget,
    options: Any,
    reconstruct: bool = False,
    grid: Grid | None = None,
) -> Pruned:
    """A method's result for one linear, which is not changed."""
    weight = linear.weight.data
    rounds = grid is not None and not reconstruct and pruner.traits.get("rounds", False)
    # These come first: a method may consume the sums.
    hessian = None
    if reconstruct:
        assert statistics is not None
        hessian = shared_hessian(statistics)
    if grid is not None:
        assert statistics is not None
        shared_factor(statistics, DAMPING, target.name, last_use=False)
    pruned = pruner.function(weight, statistics, target, options, *((grid,) if rounds else ()))
    if hessian is not None:
        pruned = reconstructed(pruned, weight, hessian, target.name)
    if grid is not None:
        assert statistics is not None
        pruned = rounded(pruned, weight, statistics, target, grid)
    return pruned


def assign(layer: LayerContext, count: int) -> dict[str, int]:
    """Assign a layer's linears to ``count`` processes, largest work first to whoever has least.

    Linears that share an input stay together, since a solver shares what it derives from that input.
    """
    groups: dict[int, list[str]] = {}
    for name in layer.linears:
        groups.setdefault(id(layer.statistics.get(name, name)), []).append(name)

    def work(names: list[str]) -> int:
        columns = layer.linears[names[0]].in_features
        return columns**3 + sum(layer.linears[name].out_features for name in names) * columns**2

    loads = [0] * count
    owners: dict[str, int] = {}
    for names in sorted(groups.values(), key=work, reverse=True):
        owner = loads.index(min(loads))
        loads[owner] += work(names)
        owners.update(dict.fromkeys(names, owner))
    return owners


def _check_mask(name: str, mask: torch.Tensor, weight: torch.Tensor, target: ModuleTarget) -> None:
    """Refuse a stored mask that is not the weight's.

    Raises:
        UserError: another shape, another number of pruned weights than planned, or some that are not zero.
    """
    fits = mask.shape == weight.shape and int(torch.count_nonzero(~mask)) == target.zeros
    if not fits or bool((weight[~mask] != 0).any()):
        raise UserError(f"the mask of {name} is not that of its weight", "Prune the model again.")


def _release(statistics: dict[str, InputStatistics], name: str) -> None:
    """Drop a linear's statistics; with the last linear of an input their memory is given back."""
    spent = statistics.pop(name, None)
    shared = spent in statistics.values()
    del spent
    if not shared:
        return_freed_memory()


def _replace(linear: PrunableLinear, weight: torch.Tensor, stored: torch.dtype | None) -> None:
    """Give a linear its new weight, as it will be stored. It is not copied: the dense one goes at once."""
    assign_weight(linear, weight.to(stored or weight.dtype).to(linear.weight.dtype))


def _shared(pruned: Pruned | None, weight: torch.Tensor, kind: torch.dtype, owner: int, processes: Processes) -> Pruned:
    """The owner's result, of that type, on every process."""
    if processes.count == 1:
        assert pruned is not None
        return pruned
    mask = pruned.mask.to(torch.uint8) if pruned else torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    values = pruned.weight.contiguous() if pruned else torch.empty_like(weight, dtype=kind)
    processes.broadcast(mask, owner)
    processes.broadcast(values, owner)
    scales = pruned.scales.cpu() if pruned and pruned.scales is not None else None
    loss, scales = processes.broadcast_object((pruned.loss if pruned else None, scales), owner)
    return Pruned(mask.bool(), values, loss, scales)


def prune_model(
    model: nn.Module,
    tokens: torch.Tensor | None,
    plan: SparsityPlan,
    method: str,
    options: Any,
    batch_size: int | None = None,
    *,
    accumulate: torch.dtype = torch.float32,
    reconstruct: bool = False,
    grid: Grid | None = None,
) -> dict[str, Pruned]:
    """Prune a model in place, layer by layer, each on the inputs that the pruned layers before it give.

    Args:
        tokens: calibration sequences int64 ``[sequences, length]``; None for methods that need none.
        accumulate, reconstruct, grid: see :func:`prune_layers`.

    Returns:
        By module name; masks are on the CPU, weights are those of the model.

    Raises:
        UserError: a plan for other modules, or weights or activations that are not finite.
    """
    result: dict[str, Pruned] = {}
    source = ResidentLayers(model, plan.has_head)
    extra: dict[str, Any] = {"batch_size": batch_size, "accumulate": accumulate}
    for layer in prune_layers(source, tokens, plan, method, options, reconstruct=reconstruct, grid=grid, **extra):
        result.update({name: replace(pruned, mask=pruned.mask.cpu()) for name, pruned in layer.modules.items()})
    return result


def losses_of(modules: Mapping[str, Pruned]) -> dict[str, float]:
    """The losses of those modules whose pruner reports one."""
    return {name: pruned.loss for name, pruned in modules.items() if pruned.loss is not None}
