"""What the jobs decide, in one place: the frozen dataclasses that the command line and the recipes fill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsedeploy.calibration.text import CalibrationOptions
from sparsedeploy.plan import SparsityPlan
from sparsedeploy.recovery.data import DataOptions


@dataclass(frozen=True)
class PruneOptions:
    """Everything that ``prune`` decides.

    Attributes:
        sparsity: global fraction of zeros; None takes the N:M pattern's own.
        pattern: ``unstructured``, ``N:M`` (N kept) or ``mixed-N:M`` (N kept on average).
        pattern_options: of a mixed pattern (:class:`sparsedeploy.allocation.MixedOptions`).
        plan: a ready plan, in place of ``sparsity``, ``pattern`` and ``allocation``.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    pattern_options: Mapping[str, Any] | None = None
    method: str = "wanda"
    method_options: Mapping[str, Any] | None = None
    allocation: str = "uniform"
    allocation_options: Mapping[str, Any] | None = None
    plan: SparsityPlan | None = None
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)


@dataclass(frozen=True)
class RecoverOptions:
    """Everything that recovery decides.

    Attributes:
        method: a registered recovery; ``options`` its options.
        data: the text to train on; None for methods that do not train.
        training: values of :class:`TrainingOptions`.
        seed: of adapters, dropout and the order of the text.
    """

    method: str = "losa"
    options: Mapping[str, Any] | None = None
    data: DataOptions | None = None
    training: Mapping[str, Any] | None = None
    seed: int = 0
