"""Evaluate a model folder: perplexity on texts, accuracy on tasks, and what is needed to repeat the figures."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparsedeploy.artifacts.description import ARTIFACT_FILE, load_artifact
from sparsedeploy.calibration.documents import read_split
from sparsedeploy.calibration.samples import default_length
from sparsedeploy.errors import UserError
from sparsedeploy.models.config_check import positions
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.loading import load_asked, load_config, resolve_model
from sparsedeploy.models.options import LoadOptions
from sparsedeploy.models.tokenizer import check_tokens, load_tokenizer
from sparsedeploy.quality.options import EvalOptions
from sparsedeploy.quality.perplexity import check_causal, perplexity, text_windows
from sparsedeploy.quality.tasks import load_tasks, run_tasks


def evaluate(source: str | Path, options: EvalOptions, load: LoadOptions = LoadOptions()) -> dict[str, Any]:
    """Perplexity of a model on texts and its scores on tasks, with everything needed to repeat the figures.

    The documents of a text are joined with blank lines and tokenised once; see :func:`load_documents` for what a text
    may be.

    Returns:
        Plain data. ``texts`` has the figures of each text by name; those of the first also stand at the top.
        ``tasks`` and ``harness`` are :func:`run_tasks`'.

    Raises:
        UserError: nothing to measure, a model, text or task that cannot be used, or a loss that is not finite.
    """
    asked, tasks, trust = options.text, options.tasks, load.trust_remote_code
    texts = named_texts(asked.data)
    if not texts and not tasks.names:
        raise UserError("nothing to measure", "Give --data TEXT, --tasks NAME, or both.")
    folder = resolve_model(source)
    if (folder / ARTIFACT_FILE).is_file():
        load_artifact(folder)
    config = load_config(folder, trust_remote_code=trust)
    length = default_length(config) if options.context is None else options.context
    limit = positions(config) or max(length, 2)
    if not 2 <= length <= limit:
        raise UserError(f"context {length} is outside [2, {limit}], the model's positions", "Lower --context.")
    tokenizer = load_tokenizer(folder, trust_remote_code=trust)
    windows = {
        name: text_windows(text, tokenizer, length, field=asked.field, split=asked.split, limit=asked.max_windows)
        for name, text in texts.items()
    }
    vocabulary = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    if vocabulary is None:
        raise UserError(
            f"the configuration of a {config.model_type} model names no vocabulary, so it has no perplexity",
            "Use a causal language model.",
        )
    for name, part in windows.items():
        check_tokens(part, vocabulary, texts[name])
    loaded = load_tasks(tasks) if tasks.names else {}
    model = load_asked(folder, load)
    for part in windows.values():
        check_causal(model, part[0])
    measured = {
        name: {
            "data": texts[name],
            "split": read_split(texts[name], asked.split),
            "tokens_sha256": hashlib.sha256(part.numpy().tobytes()).hexdigest(),
            **perplexity(model, part, batch_size=options.batch_size).to_dict(),
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
    if tasks.names:
        result |= run_tasks(model, tokenizer, loaded, tasks, context=length, batch_size=options.batch_size)
    return result


def named_texts(items: Sequence[str]) -> dict[str, str]:
    """Name -> text of ``NAME=TEXT`` or plain ``TEXT`` items.

    Raises:
        UserError: a name is given twice.
    """
    texts: dict[str, str] = {}
    for item in items:
        named = re.fullmatch(r"([\w.+-]+)=(.+)", item)
        name, text = named.groups() if named and not os.path.exists(item) else (item, item)
        if name in texts:
            raise UserError(f"text '{name}' is given twice", "Give each text a name of its own: --data NAME=TEXT.")
        texts[name] = text
    return texts
