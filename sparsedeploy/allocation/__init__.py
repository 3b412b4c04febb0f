"""Allocators, one file per method. Importing the package registers all of them."""

from sparsedeploy.allocation import alphapruning, atp, dlp, lsa, owl, rmi, uniform
from sparsedeploy.allocation.allocate import allocate, measure_layers, model_layers
from sparsedeploy.allocation.base import ALLOCATORS, Allocator, Shares, Unit
from sparsedeploy.allocation.budget import plan_from_shares
from sparsedeploy.allocation.mixed import MixedOptions, mixed_plan

__all__ = [
    "ALLOCATORS",
    "Allocator",
    "MixedOptions",
    "Shares",
    "Unit",
    "allocate",
    "alphapruning",
    "atp",
    "dlp",
    "lsa",
    "measure_layers",
    "mixed_plan",
    "model_layers",
    "owl",
    "plan_from_shares",
    "rmi",
    "uniform",
]
