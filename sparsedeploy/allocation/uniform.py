"""The same rate everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from sparsedeploy.allocation.base import Allocation, layer_units
from sparsedeploy.calibration.driver import LayerContext
from sparsedeploy.options import Options
from sparsedeploy.plan import ModuleShape
from sparsedeploy.registry import ALLOCATORS


@dataclass(frozen=True)
class UniformOptions(Options):
    """Uniform has no options."""


@ALLOCATORS.register("uniform", UniformOptions, needs="none", strength=None)
class Uniform:
    """Every module gets the target rate."""

    def __init__(self, options: UniformOptions) -> None:
        self.options = options

    def measure(self, layer: LayerContext) -> None:
        return None

    def allocate(self, measured: list[None], layers: list[list[ModuleShape]], sparsity: float) -> Allocation:
        return Allocation(layer_units(layers, [0.0] * len(layers)))
