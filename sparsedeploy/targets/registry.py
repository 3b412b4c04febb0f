"""The export targets. Each lives in a file of its own that registers one function; they are listed in ``_MODULES``."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsedeploy.artifacts.description import Artifact
from sparsedeploy.errors import UserError
from sparsedeploy.registry import Registry

# Called as function(checkpoint, output, options, trust_remote_code=..., overwrite=...).
ExportFunction = Callable[..., Artifact]
TARGETS: Registry[ExportFunction] = Registry("export target")
_MODULES = ("deepsparse", "llmcompressor", "onnxruntime", "vllm")


def export_targets() -> Registry[ExportFunction]:
    """Every target, with their modules imported."""
    for name in _MODULES:
        importlib.import_module(f"sparsedeploy.targets.{name}")
    return TARGETS


def export_checkpoint(
    checkpoint: str | Path,
    target: str,
    output: Path,
    options: Mapping[str, Any] | None = None,
    *,
    quantize: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> Artifact:
    """Export a checkpoint for a target.

    Args:
        checkpoint: a model folder (dense or pruned) or a hub id.
        options: the target's own options, by name; the rest keep their defaults.
        quantize: a scheme to quantise the weights by; the option ``quantize`` of the targets that have it.

    Raises:
        UserError: an unknown target or option, or whatever the target refuses.
    """
    method = export_targets().get(target)
    if quantize is not None:
        if "quantize" not in {field.name for field in dataclasses.fields(method.options)}:
            raise UserError(
                f"--quantize does not go with --target {target}",
                "Use --target vllm; for DeepSparse it is --target-option int8=true.",
            )
        options = {**(options or {}), "quantize": quantize}
    return method.function(
        checkpoint, output, method.make_options(options), trust_remote_code=trust_remote_code, overwrite=overwrite
    )
