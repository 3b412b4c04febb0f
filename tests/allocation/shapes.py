"""Layer shapes of published models, and driver views made from plain tensors."""

from __future__ import annotations

import torch
from torch import nn

from sparsedeploy.calibration.driver import LayerContext
from sparsedeploy.calibration.statistics import InputStatistics, Kind
from sparsedeploy.plan import ModuleShape

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def llama_layers(
    count: int = 32, hidden: int = 4096, intermediate: int = 11008, key_value: int | None = None
) -> list[list[ModuleShape]]:
    """LLaMA-2-7B by default; ``key_value`` is the width of k and v under grouped-query attention."""
    rows = {"k_proj": key_value or hidden, "v_proj": key_value or hidden}
    return [
        [ModuleShape(f"model.layers.{i}.self_attn.{name}", rows.get(name, hidden), hidden) for name in _ATTENTION]
        + [ModuleShape(f"model.layers.{i}.mlp.{name}", intermediate, hidden) for name in ("gate_proj", "up_proj")]
        + [ModuleShape(f"model.layers.{i}.mlp.down_proj", hidden, intermediate)]
        for i in range(count)
    ]


def view(
    weights: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor] | None = None, kind: Kind = "hessian"
) -> LayerContext:
    """A layer of linears with the statistics of ``inputs [tokens, columns]``; equal tensors share an object."""
    linears = {}
    for name, weight in weights.items():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight
        linears[name] = linear
    shared: dict[int, InputStatistics] = {}
    statistics = {}
    for name, x in (inputs or {}).items():
        if id(x) not in shared:
            shared[id(x)] = InputStatistics(x.shape[1], kind, torch.device("cpu"))
            shared[id(x)].add(x, 1)
        statistics[name] = shared[id(x)]
    return LayerContext(0, linears, statistics, torch.empty(0))
