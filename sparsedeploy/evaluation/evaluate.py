"""Evaluate a model folder: the edge around :mod:`sparsedeploy.evaluation.perplexity`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from sparsedeploy.calibration.documents import load_documents
from sparsedeploy.calibration.samples import default_length
from sparsedeploy.errors import UserError
from sparsedeploy.evaluation.perplexity import perplexity, windows_of
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.loading import load_config, load_model, load_tokenizer, resolve_device, resolve_model


def evaluate(
    source: str | Path,
    data: str,
    *,
    split: str = "test",
    field: str = "text",
    context: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Perplexity of a model on a text, with everything needed to repeat the figure.

    Documents are joined with blank lines and tokenised once.

    Args:
        context: window length in tokens; None takes min(2048, the model's positions). It changes the figure: never
            compare figures of different contexts.
        max_windows: evaluate only the first so many windows.

    Raises:
        UserError: a model or text that cannot be used, or a loss that is not finite.
    """
    folder = resolve_model(source)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    length = context or default_length(config)
    positions = getattr(config, "max_position_embeddings", length)
    if not 2 <= length <= positions:
        raise UserError(f"context {length} is outside [2, {positions}], the model's positions", "Lower --context.")
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    text = "\n\n".join(load_documents(data, field=field, split=split))
    windows = windows_of(tokenizer(text, verbose=False)["input_ids"], length, data)
    if max_windows is not None:
        windows = windows[:max_windows]
    model = load_model(folder, device=resolve_device(device), trust_remote_code=trust_remote_code)
    result = perplexity(model, windows, batch_size=batch_size)
    return {
        "model": str(source),
        "model_sha256": model_sha256(folder),
        "data": data,
        "split": split,
        "tokens_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "torch": torch.__version__,
        **result.to_dict(),
    }
