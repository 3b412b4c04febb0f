"""Calibration sequences: tokens drawn from documents by a private, seeded sampler."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from sparsedeploy.checkpoint.manifest import CalibrationRecord
from sparsedeploy.errors import UserError
from sparsedeploy.models.config_check import positions
from sparsedeploy.models.tokenizer import token_ids

DEFAULT_SAMPLES = 128
DEFAULT_LENGTH = 2048
_TRIES_PER_SAMPLE = 50


@dataclass(frozen=True)
class CalibrationSet:
    """Token sequences of one length.

    Attributes:
        tokens: int64 ``[sequences, length]``.
        data: where the text came from, as the user named it; ``field`` its text column.
        seed: the sampler's seed.
    """

    tokens: torch.Tensor
    data: str
    seed: int
    field: str = "text"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens and their shape."""
        digest = hashlib.sha256(repr(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> CalibrationRecord:
        """What a manifest keeps."""
        sequences, length = self.tokens.shape
        return CalibrationRecord(self.data, sequences, length, self.seed, self.fingerprint, self.field)


def default_length(config: Any) -> int:
    """min(2048, the model's positions): long contexts would need memory and bring little."""
    return min(DEFAULT_LENGTH, positions(config) or DEFAULT_LENGTH)


def sample_tokens(
    documents: list[str], tokenizer: Any, *, sequences: int, length: int, seed: int, data: str, field: str = "text"
) -> CalibrationSet:
    """Draw ``sequences`` windows of ``length`` tokens: a random document, a random offset in it.

    Documents shorter than a window are rejected; when no document is long enough, all are joined into one stream.

    Raises:
        UserError: all the text together is shorter than one window, or a count is not positive.
    """
    if sequences < 1 or length < 2:
        raise UserError(f"cannot draw {sequences} sequences of {length} tokens", "Use at least 1 sequence of 2 tokens.")
    if 8 * sequences * length > psutil.virtual_memory().available // 2:
        raise UserError(
            f"{sequences} sequences of {length} tokens do not fit in memory", "Lower --samples or --calibration-length."
        )
    # A token covers at least one byte, special tokens aside.
    different = sum(len(text.encode()) + 2 for text in documents)
    if sequences > max(DEFAULT_SAMPLES, different):
        raise UserError(
            f"{sequences} sequences were asked for, and the text of '{data}' has at most {different} different ones",
            "Lower --samples, or give more text.",
        )
    rng = random.Random(seed)
    encoded: dict[int, list[int]] = {}

    def encode(index: int) -> list[int]:
        if index not in encoded:
            encoded[index] = token_ids(tokenizer, documents[index], verbose=False)
        return encoded[index]

    windows: list[list[int]] = []
    # Shorter documents need no tokenising to be rejected.
    candidates = [i for i, text in enumerate(documents) if len(text.encode()) + 2 >= length]
    tries = _TRIES_PER_SAMPLE * sequences if candidates else 0
    while len(windows) < sequences and tries > 0:
        tries -= 1
        tokens = encode(rng.choice(candidates))
        if len(tokens) >= length:
            windows.append(_window(tokens, length, rng))
    if len(windows) < sequences:
        stream = [token for index in range(len(documents)) for token in encode(index)]
        if len(stream) < length:
            raise UserError(
                f"the text of '{data}' gives {len(stream)} tokens, fewer than one sequence of {length}",
                "Give more text, or lower --calibration-length.",
            )
        windows.extend(_window(stream, length, rng) for _ in range(sequences - len(windows)))
    return CalibrationSet(torch.tensor(windows, dtype=torch.int64), data, seed, field)


def _window(tokens: list[int], length: int, rng: random.Random) -> list[int]:
    start = rng.randint(0, len(tokens) - length)
    return tokens[start : start + length]
