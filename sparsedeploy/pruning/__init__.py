"""Pruners, one file per method. Importing the package registers all of them."""

from sparsedeploy.pruning import magnitude, sparsegpt, wanda
from sparsedeploy.pruning.base import PRUNERS, Pruned, Pruner

__all__ = ["PRUNERS", "Pruned", "Pruner", "magnitude", "sparsegpt", "wanda"]
