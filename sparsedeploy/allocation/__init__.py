"""Allocators: one method a file, found by its name."""

from sparsedeploy.allocation.allocate import allocate, measure_layers, model_layers
from sparsedeploy.allocation.base import Allocator, Shares, Unit
from sparsedeploy.allocation.budget import plan_from_shares
from sparsedeploy.allocation.mixed import MixedOptions, mixed_plan
from sparsedeploy.registry import ALLOCATORS

__all__ = [
    "ALLOCATORS",
    "Allocator",
    "MixedOptions",
    "Shares",
    "Unit",
    "allocate",
    "measure_layers",
    "mixed_plan",
    "model_layers",
    "plan_from_shares",
]
