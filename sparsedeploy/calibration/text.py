"""Which text is measured, and its tokens: drawn anew, or read again from what a checkpoint's manifest says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparsedeploy.calibration.documents import load_documents
from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.calibration.samples import CalibrationSet, default_length, sample_tokens
from sparsedeploy.checkpoint.manifest import Manifest
from sparsedeploy.errors import UserError
from sparsedeploy.models.config_check import positions
from sparsedeploy.models.tokenizer import check_tokens, load_tokenizer


def calibration_set(
    folder: Path, config: Any, options: CalibrationOptions, *, trust_remote_code: bool = False
) -> CalibrationSet:
    """:func:`draw_sequences` with the tokenizer of a model's folder.

    Raises:
        UserError: see there; also no tokenizer.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    return draw_sequences(tokenizer, config, options)


def draw_sequences(tokenizer: Any, config: Any, options: CalibrationOptions) -> CalibrationSet:
    """Read, tokenise and sample the calibration text.

    Raises:
        UserError: no text or too little, or sequences longer than the model's positions.
    """
    limit = positions(config)
    length = options.length or default_length(config)
    if limit is not None and length > limit:
        raise UserError(
            f"calibration length {length} exceeds the model's {limit} positions", "Lower --calibration-length."
        )
    documents = load_documents(options.data, field=options.field)
    drawn = sample_tokens(
        documents,
        tokenizer,
        sequences=options.sequences,
        length=length,
        seed=options.seed,
        data=options.data,
        field=options.field,
    )
    check_tokens(drawn.tokens, config.get_text_config(decoder=True).vocab_size, options.data)
    return drawn


def recorded_options(manifest: Manifest, *, data: str | None = None, field: str | None = None) -> CalibrationOptions:
    """The options that draw a checkpoint's calibration sequences again.

    Args:
        data: where the text is now, when that is not where the manifest says; ``field`` its text column.

    Raises:
        UserError: the checkpoint was pruned without text.
    """
    recorded = manifest.calibration
    if recorded is None:
        raise UserError(
            f"the checkpoint was pruned without calibration text ({manifest.method})",
            "Prune with a method that reads text, such as wanda, or name a text where there is such an option.",
        )
    return CalibrationOptions(
        data=data or recorded.data,
        field=field or recorded.field,
        sequences=recorded.sequences,
        length=recorded.length,
        seed=recorded.seed,
    )


def text_of(manifest: Manifest | None, data: str | None, field: str | None) -> tuple[str | None, str]:
    """The text that was named, or else a checkpoint's own (None: it has none), and its text column."""
    recorded = manifest.calibration if manifest else None
    data = data or (recorded.data if recorded else None)
    return data, field or (recorded.field if recorded and data == recorded.data else CalibrationOptions.field)


def recorded_tokens(
    tokenizer: Any, config: Any, manifest: Manifest, *, data: str | None = None, field: str | None = None
) -> torch.Tensor:
    """The calibration sequences of a checkpoint, int64 ``[sequences, length]``.

    Args:
        data, field: see :func:`recorded_options`.

    Raises:
        UserError: the checkpoint was pruned without text, or the text is gone or gives other tokens now.
    """
    options = recorded_options(manifest, data=data, field=field)
    found = draw_sequences(tokenizer, config, options)
    if manifest.calibration is None or found.fingerprint != manifest.calibration.sha256:
        raise UserError(
            f"the text '{options.data}' gives other tokens than the checkpoint was pruned with",
            "Name that text: --target-option data=TEXT (and field=NAME for a text column of another name).",
        )
    return found.tokens
