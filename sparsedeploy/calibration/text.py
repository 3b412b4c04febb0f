"""Which text is measured, and its tokens: drawn anew, or read again from what a checkpoint's manifest says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sparsedeploy.calibration.documents import load_documents
from sparsedeploy.calibration.samples import CalibrationSet, default_length, sample_tokens
from sparsedeploy.errors import UserError
from sparsedeploy.models.loading import load_config, load_tokenizer
from sparsedeploy.options import Options, option, seed_option


@dataclass(frozen=True)
class CalibrationOptions(Options):
    """Which text is measured."""

    data: str = option("c4", "Calibration text: file, folder, .jsonl, stdlib, c4, datasets:NAME[:CONFIG].", short="-d")
    field: str = option("text", "Text field of JSONL rows and data sets.", flag="--data-field")
    sequences: int = option(128, "Calibration sequences.", flag="--samples", short="-n", at_least=1)
    length: int | None = option(
        None,
        "Tokens per sequence [default: min(2048, positions)].",
        flag="--calibration-length",
        at_least=2,
    )
    seed: int = seed_option("Seed of the calibration sampler.")
    batch_size: int | None = option(
        None, "Sequences per layer call; no effect on results [default: by free memory].", at_least=1
    )
    accumulate: Literal["float32", "float64"] = option(
        "float32", "Sum statistics in float32, or in float64 for the same bits on any process count."
    )

    @property
    def accumulation(self) -> torch.dtype:
        """The type of ``accumulate``."""
        dtype: torch.dtype = getattr(torch, self.accumulate)
        return dtype


def calibration_set(
    folder: Path, config: Any, options: CalibrationOptions, *, trust_remote_code: bool = False
) -> CalibrationSet:
    """Read, tokenise and sample the calibration text.

    Raises:
        UserError: no tokenizer, no text or too little, or sequences longer than the model's positions.
    """
    positions = getattr(config, "max_position_embeddings", None)
    length = options.length or default_length(config)
    if positions is not None and length > positions:
        raise UserError(
            f"calibration length {length} exceeds the model's {positions} positions", "Lower --calibration-length."
        )
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    documents = load_documents(options.data, field=options.field)
    return sample_tokens(
        documents, tokenizer, sequences=options.sequences, length=length, seed=options.seed, data=options.data
    )


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
