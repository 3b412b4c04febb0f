"""The small files that travel with a model: what a tokenizer or a generation loop may read, never weights or code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sparsedeploy.reading import contained

TOKENIZER_CONFIG = "tokenizer_config.json"
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
)


def copy_companions(checkpoint: Path, folder: Path, *, without: tuple[str, ...] = ()) -> None:
    """Copy those that the checkpoint has.

    Raises:
        UserError: one is a link out of the checkpoint.
    """
    for name in COMPANIONS:
        if name not in without and (checkpoint / name).is_file():
            shutil.copyfile(contained(checkpoint, name, str(checkpoint)), folder / name)


def older_tokenizer(settings: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's settings for transformers 4, which does not know the class that transformers 5 writes for a plain
    ``tokenizer.json``.
    """
    if settings.get("tokenizer_class") == "TokenizersBackend":
        return {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    return settings
