"""Evaluate a model folder: perplexity on texts, accuracy on tasks, and what is needed to repeat the figures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsedeploy.calibration.documents import read_split
from sparsedeploy.calibration.samples import default_length
from sparsedeploy.errors import UserError
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.loading import load_config, load_model, resolve_device, resolve_model
from sparsedeploy.models.tokenizer import check_tokens, load_tokenizer
from sparsedeploy.quality.perplexity import perplexity, text_windows
from sparsedeploy.quality.tasks import TaskOptions, load_tasks, run_tasks


def evaluate(
    source: str | Path,
    data: str | Mapping[str, str] | None,
    *,
    tasks: TaskOptions | None = None,
    split: str = "test",
    field: str = "text",
    context: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Perplexity of a model on texts and its scores on tasks, with everything needed to repeat the figures.

    The documents of a text are joined with blank lines and tokenised once.

    Args:
        data: one text, several by name, or None; see :func:`load_documents` for what a text may be.
        tasks: what the harness measures, or None.
        context: window length in tokens, and the longest input of a task; None takes min(2048, the model's positions).
            It changes the figure: never compare figures of different contexts.
        max_windows: evaluate only the first so many windows of each text.
        batch_size: windows, or a task's requests, per forward pass.

        dtype: to compute in; None takes the checkpoint's own, or float32 where the processor is bad at that.

    Returns:
        Plain data. ``texts`` has the figures of each text by name; those of the first also stand at the top.
        ``tasks`` and ``harness`` are :func:`run_tasks`'.

    Raises:
        UserError: nothing to measure, a model, text or task that cannot be used, or a loss that is not finite.
    """
    texts = {data: data} if isinstance(data, str) else dict(data or {})
    if not texts and tasks is None:
        raise UserError("nothing to measure", "Give --data TEXT, --tasks NAME, or both.")
    if batch_size < 1 or (max_windows is not None and max_windows < 1):
        raise UserError("batch size and number of windows must be at least 1", "Raise --batch-size or --max-windows.")
    folder = resolve_model(source)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    length = default_length(config) if context is None else context
    positions = getattr(config, "max_position_embeddings", length)
    if not 2 <= length <= positions:
        raise UserError(f"context {length} is outside [2, {positions}], the model's positions", "Lower --context.")
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    windows = {
        name: text_windows(text, tokenizer, length, field=field, split=split, limit=max_windows)
        for name, text in texts.items()
    }
    for name, part in windows.items():
        check_tokens(part, config.get_text_config(decoder=True).vocab_size, texts[name])
    loaded = load_tasks(tasks) if tasks is not None else {}
    model = load_model(folder, dtype=dtype, device=resolve_device(device), trust_remote_code=trust_remote_code)
    measured = {
        name: {
            "data": texts[name],
            "split": read_split(texts[name], split),
            "tokens_sha256": hashlib.sha256(part.numpy().tobytes()).hexdigest(),
            **perplexity(model, part, batch_size=batch_size).to_dict(),
        }
        for name, part in windows.items()
    }
    result: dict[str, Any] = {
        "model": str(source),
        "model_sha256": model_sha256(folder),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
    if measured:
        result |= {**next(iter(measured.values())), "texts": measured}
    if tasks is not None:
        result |= run_tasks(model, tokenizer, loaded, tasks, context=length, batch_size=batch_size)
    return result
