"""What every pruner is: weight, statistics and target in; mask and new weight out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sparsedeploy.calibration.statistics import InputStatistics
from sparsedeploy.plan import ModuleTarget
from sparsedeploy.registry import Registry


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


_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# (weight [rows, columns], statistics of the module's input or None, target, options) -> Pruned
Pruner = Callable[[torch.Tensor, InputStatistics | None, ModuleTarget, Any], Pruned]
PRUNERS: Registry[Pruner] = Registry("pruning method")


def apply_mask(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The weight with masked entries exactly +0, survivors bit-identical.

    By an "and" of the bits, which is vectorised for every type, where a choice of values is not.
    """
    bits = _INTEGER_OF_SIZE[weight.element_size()]
    return (weight.view(bits) & mask.to(bits).neg_()).view(weight.dtype)
