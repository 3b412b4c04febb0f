"""Recovery: win a pruned model's quality back inside its mask. Importing the package registers every method."""

from sparsedeploy.recovery import losa, sparse_lora, sparselo
from sparsedeploy.recovery.base import Recovered, RecoveryJob
from sparsedeploy.recovery.registry import RECOVERIES

__all__ = ["RECOVERIES", "Recovered", "RecoveryJob", "losa", "sparse_lora", "sparselo"]
