"""Take a Hugging Face causal LM, prune it, and ship it to a runtime that is measurably faster.

The functions here are imported when they are first used: ``import sparsedeploy`` alone loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsedeploy.formats.register import register_with_transformers
from sparsedeploy.version import __version__

if TYPE_CHECKING:
    from sparsedeploy.calibration.options import CalibrationOptions
    from sparsedeploy.errors import UserError
    from sparsedeploy.quality.evaluate import evaluate
    from sparsedeploy.runtimes.engine import open_model
    from sparsedeploy.runtimes.serving import serve
    from sparsedeploy.targets.registry import export_checkpoint
    from sparsedeploy.workflows.in_memory import PrunedModel, prune
    from sparsedeploy.workflows.options import PruneOptions

register_with_transformers()

__all__ = [
    "CalibrationOptions",
    "PruneOptions",
    "PrunedModel",
    "UserError",
    "__version__",
    "evaluate",
    "export_checkpoint",
    "open_model",
    "prune",
    "serve",
]

_FOUND_IN = {
    "CalibrationOptions": "calibration.options",
    "PruneOptions": "workflows.options",
    "PrunedModel": "workflows.in_memory",
    "UserError": "errors",
    "evaluate": "quality.evaluate",
    "export_checkpoint": "targets.registry",
    "open_model": "runtimes.engine",
    "prune": "workflows.in_memory",
    "serve": "runtimes.serving",
}


def __getattr__(name: str) -> Any:
    if name not in _FOUND_IN:
        raise AttributeError(f"module 'sparsedeploy' has no attribute '{name}'")
    return getattr(importlib.import_module(f"sparsedeploy.{_FOUND_IN[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
