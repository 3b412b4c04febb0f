"""Recovery of quality inside the mask: one method a file, found by its name."""

from sparsedeploy.recovery.base import Recovered, RecoveryJob, RecoveryMethod
from sparsedeploy.registry import RECOVERIES

__all__ = ["RECOVERIES", "Recovered", "RecoveryJob", "RecoveryMethod"]
