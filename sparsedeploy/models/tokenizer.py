"""Open a model's tokenizer, and make sure that the model has a row for every token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparsedeploy.errors import UserError
from sparsedeploy.models.config_check import vocabulary_size
from sparsedeploy.reading import SOUND_COPY, read_object

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt", "tokenizer_config.json")
_FIX = "Copy the tokenizer files of the original model into the folder."


def load_tokenizer(folder: Path, *, vocabulary: int | None = None, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Its own code never runs unless trusted.

    Args:
        vocabulary: rows of the embedding; None reads them from ``config.json``.

    Raises:
        UserError: the folder has none, it does not load, or it has tokens that the model has no row for.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _FILES):
        raise UserError(f"{folder} has no tokenizer", _FIX)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            read_object(folder / name, fix=_FIX)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=not trust_remote_code
        )
        # Its settings are used here, not before; what it adds to every text is among the tokens.
        added = tokenizer("a", verbose=False)["input_ids"]
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"the tokenizer in {folder} needs its own Python code to load",
                "Where the command has it and you trust the source: --trust-remote-code.",
            ) from error
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the tokenizer in {folder} does not load ({type(error).__name__}: {reason})", _FIX) from error
    if vocabulary is None and (folder / "config.json").exists():
        vocabulary = vocabulary_size(read_object(folder / "config.json", fix=SOUND_COPY))
    if vocabulary is not None:
        _check_vocabulary(tokenizer, vocabulary, folder)
        check_tokens(added, vocabulary, "a")
    return tokenizer


def token_ids(tokenizer: Any, texts: Any, **settings: Any) -> Any:
    """The token numbers of a text, or of each in a list.

    Args:
        settings: of the tokenizer's call.

    Raises:
        UserError: a text that the tokenizer has no tokens for.
    """
    try:
        return tokenizer(texts, **settings)["input_ids"]
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the tokenizer fails on the text ({type(error).__name__}: {reason})", _FIX) from error


def check_tokens(tokens: torch.Tensor | Sequence[int], vocabulary: int, data: str) -> None:
    """Refuse token ids beyond the embedding before the model sees them.

    Args:
        data: what the text is, for errors.

    Raises:
        UserError: naming the largest.
    """
    every = torch.as_tensor(tokens)
    largest = int(every.max()) if every.numel() else -1
    if largest >= vocabulary:
        raise UserError(
            f"the tokenizer turns the text of '{data}' into token {largest}, the model has {vocabulary}", _FIX
        )


def _check_vocabulary(tokenizer: Any, vocabulary: int, folder: Path) -> None:
    """Tokens added later may lie beyond the embedding (some models ship such, for uses of their own); no others."""
    added = set(tokenizer.added_tokens_encoder.values())
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    beyond = [number for number in known if number >= vocabulary and (number not in added or number in special)]
    if beyond:
        raise UserError(
            f"the tokenizer in {folder} has token {max(beyond)} ({known[max(beyond)]!r}), the model has {vocabulary}: "
            "they do not belong together",
            _FIX,
        )
