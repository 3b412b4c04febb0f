"""What every pruner is: weight, statistics and target in; mask and new weight out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sparsedeploy.calibration.statistics import InputStatistics
from sparsedeploy.plan import ModuleTarget


@dataclass(frozen=True)
class Pruned:
    """The result for one module.

    Attributes:
        mask: bool ``[rows, columns]``, True where kept; exactly ``target.zeros`` entries are False.
        weight: ``[rows, columns]`` in the module's dtype, zero wherever the mask is False.
        loss: the pruner's own reconstruction error, when it has one.
    """

    mask: torch.Tensor
    weight: torch.Tensor
    loss: float | None = None


# (weight [rows, columns], statistics of the module's input or None, target, options) -> Pruned
Pruner = Callable[[torch.Tensor, InputStatistics | None, ModuleTarget, Any], Pruned]
