"""Allocators, one file per method. Importing the package registers all of them."""

from sparsedeploy.allocation import owl, uniform
from sparsedeploy.allocation.base import ALLOCATORS, Allocator, Shares, Unit
from sparsedeploy.allocation.budget import plan_from_shares

__all__ = ["ALLOCATORS", "Allocator", "Shares", "Unit", "owl", "plan_from_shares", "uniform"]
