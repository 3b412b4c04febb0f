"""Export a checkpoint for a target; each target is one file, found by its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsedeploy.artifacts.card import write_artifact_card
from sparsedeploy.artifacts.description import Artifact
from sparsedeploy.errors import UserError
from sparsedeploy.folders import claim
from sparsedeploy.models.loading import resolve_model
from sparsedeploy.options import described
from sparsedeploy.registry import TARGETS
from sparsedeploy.targets.base import ExportJob


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
    method = TARGETS.get(target)
    if quantize is not None:
        able = [each.name for each in TARGETS if "quantize" in {item.name for item in described(each.options)}]
        if target not in able:
            raise UserError(
                f"--target {target} cannot quantise", f"Use --target {' or '.join(able)}, or leave --quantize out."
            )
        options = {**(options or {}), "quantize": quantize}
    chosen = method.make_options(options)
    paths = {item.name for item in described(method.options) if item.facts.reads}
    read = (checkpoint, *(value for name, value in (options or {}).items() if name in paths and isinstance(value, str)))
    with claim(output, overwrite=overwrite, inputs=read):
        artifact: Artifact = method.function(ExportJob(checkpoint, output, trust_remote_code, overwrite), chosen)
        write_artifact_card(output, artifact, resolve_model(checkpoint), str(checkpoint))
        return artifact
