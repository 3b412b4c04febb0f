"""Allocators: one method a file, found by its name."""

from sparsedeploy.allocation.allocate import allocate, measure_layers, model_layers
from sparsedeploy.allocation.base import Allocation, Allocator, Unit
from sparsedeploy.allocation.budget import plan_from_allocation
from sparsedeploy.allocation.mixed import MixedOptions, mixed_plan
from sparsedeploy.registry import ALLOCATORS

__all__ = [
    "ALLOCATORS",
    "Allocation",
    "Allocator",
    "MixedOptions",
    "Unit",
    "allocate",
    "measure_layers",
    "mixed_plan",
    "model_layers",
    "plan_from_allocation",
]
