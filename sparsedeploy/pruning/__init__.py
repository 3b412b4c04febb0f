"""Pruners: one method a file, found by its name."""

from sparsedeploy.pruning.base import Pruned, Pruner
from sparsedeploy.registry import PRUNERS

__all__ = ["PRUNERS", "Pruned", "Pruner"]
