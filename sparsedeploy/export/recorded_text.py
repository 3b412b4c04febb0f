"""The calibration text that a checkpoint was pruned with, read again from what its manifest says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsedeploy.errors import UserError
from sparsedeploy.models.loading import load_config
from sparsedeploy.pipeline import CalibrationOptions, calibration_set


def recorded_tokens(
    model: Path,
    manifest: Mapping[str, Any],
    *,
    data: str | None = None,
    field: str = "text",
    trust_remote_code: bool = False,
) -> torch.Tensor:
    """The calibration sequences of a checkpoint, int64 ``[sequences, length]``.

    Args:
        model: a folder with the tokenizer.
        data: where the text is now, when that is not where the manifest says.
        field: text column of JSONL rows and data sets; the manifest does not keep it.

    Raises:
        UserError: the checkpoint was pruned without text, or the text is gone or gives other tokens now.
    """
    recorded = manifest["calibration"]
    if recorded is None:
        raise UserError(
            f"the checkpoint was pruned without calibration text ({manifest['method']})",
            "Prune with --method wanda or sparsegpt, or quantise with --target-option algorithm=round.",
        )
    options = CalibrationOptions(
        data=data or recorded["data"],
        field=field,
        sequences=recorded["sequences"],
        length=recorded["length"],
        seed=recorded["seed"],
    )
    config = load_config(model, trust_remote_code=trust_remote_code)
    found = calibration_set(model, config, options, trust_remote_code=trust_remote_code)
    if found.fingerprint != recorded["sha256"]:
        raise UserError(
            f"the text '{options.data}' gives other tokens than the checkpoint was pruned with",
            "Name that text: --target-option data=TEXT (and field=NAME for a text column of another name).",
        )
    return found.tokens
