"""What every pruner is: weight, statistics and target in; mask and new weight out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Pruned:
    """The result for one module.

    Attributes:
        mask: bool ``[rows, columns]``, True where kept; exactly ``target.zeros`` entries are False.
        weight: ``[rows, columns]`` in the module's dtype, zero wherever the mask is False. One of codes is in float32,
            whatever the module's: the type that it is stored in may hold more than the one that is computed in.
        loss: the pruner's own reconstruction error, when it has one.
        scales: float16 ``[rows, groups]`` of kept weights that are codes of a :class:`~sparsedeploy.grid.Grid`.
    """

    mask: torch.Tensor
    weight: torch.Tensor
    loss: float | None = None
    scales: torch.Tensor | None = None


# A method whose trait ``rounds`` is true also takes ``grid`` and then rounds what it keeps.
# (weight [rows, columns], statistics of the module's input or None, target, options) -> Pruned
Pruner = Callable[..., Pruned]
