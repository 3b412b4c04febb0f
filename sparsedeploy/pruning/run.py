"""Prune a model layer by layer: the loop that every pruner runs in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sparsedeploy import progress
from sparsedeploy.calibration.driver import LayerDriver, walk_weights
from sparsedeploy.errors import UserError
from sparsedeploy.models.layers import LayerSource
from sparsedeploy.plan import ModuleShape, SparsityPlan
from sparsedeploy.pruning.base import PRUNERS, Pruned, apply_mask


@dataclass(frozen=True)
class PrunedLayer:
    """One finished layer.

    Attributes:
        index: its depth.
        modules: by full name; the weights are also in the model until the next layer is asked for.
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
    batch_size: int = 1,
    stored: dict[str, torch.dtype] | None = None,
    finished: int = 0,
) -> Iterator[PrunedLayer]:
    """Prune in place, each layer on the inputs that the pruned layers before it give, and yield what was done.

    Args:
        tokens: calibration sequences int64 ``[sequences, length]``; None for methods that need none.
        stored: the type that each module's weight will be stored in, where it differs from the one computed in: the
            layers that follow see the stored values.
        finished: layers before this one are pruned already and only run.

    Raises:
        UserError: a plan for other modules, no tokens for a method that needs them, or weights or activations that
            are not finite.
    """
    pruner = PRUNERS.get(method)
    needs = pruner.traits["needs"]
    stack = source.stack
    plan.check_modules([ModuleShape(name, m.out_features, m.in_features) for name, m in stack.all_linears().items()])
    targets = plan.by_name
    if needs == "none":
        layers = walk_weights(source, finished=finished)
    elif tokens is None:
        raise UserError(f"{method} measures calibration text and none was given", "Add --data.")
    else:
        layers = LayerDriver(source, tokens, batch_size=batch_size).walk(needs, changes_weights=True, finished=finished)
    with progress.bar(f"prune ({method})", len(stack.layers), "layers") as advance:
        advance(finished)
        for layer in layers:
            modules: dict[str, Pruned] = {}
            for name, linear in layer.linears.items():
                pruned = pruner.function(linear.weight.data, layer.statistics.get(name), targets[name], options)
                if int(pruned.mask.numel() - pruned.mask.sum()) != targets[name].zeros:
                    raise RuntimeError(f"{method} pruned another number of weights of {name} than planned")
                kept = pruned.weight if stored is None else pruned.weight.to(stored[name])
                linear.weight.data.copy_(apply_mask(kept, pruned.mask))
                modules[name] = pruned
            yield PrunedLayer(layer.index, modules)
            advance()
