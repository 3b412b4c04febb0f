"""The answer that an exported model must give: tokens and their logits, kept beside the model.

An engine is compared with them on the machine that it runs on, see :mod:`sparsedeploy.runtimes.self_test`. The first
tokens are random and the last ones greedy, and together they are more than the 64 of a block of an engine's cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsedeploy.artifacts.description import SelfTest
from sparsedeploy.errors import UserError

FILE = "known_answer.npz"
PROMPT, STEPS = 70, 4
TOKENS = PROMPT + STEPS
# All columns of a small vocabulary, else so many spread evenly, and the last ones, where a kernel's remainder lies.
_ALL_COLUMNS, _SPREAD, _LAST = 4096, 2048, 64
# The largest difference allowed, as a part of the largest logit. A kernel or weight that is wrong gives differences of
# the size of the logits themselves. What rounding gives, by what the engine computes in:
_FLOAT = {
    "float32": 1e-3,  # 24 bits: measured are some 1e-6
    "float16": 3e-2,  # 11 bits: 5e-4 for each operation, some ten of them for each layer
    "bfloat16": 0.15,  # 8 bits: 4e-3 for each operation
}
# Integer and 8-bit float activations: a value on the edge between two levels falls either way, a step of 1 / 255 of the
# range, and later layers carry it on.
_QUANTIZED_ACTIVATIONS = 0.15


@dataclass(frozen=True)
class KnownAnswer:
    """Tokens and what the model makes of them.

    Attributes:
        tokens: int64 [T].
        columns: the vocabulary's ids whose logits are kept, int64 [C].
        logits: after each token, float32 [T, C].
    """

    tokens: np.ndarray
    columns: np.ndarray
    logits: np.ndarray


def tolerance(dtype: str, scheme: str | None = None) -> float:
    """The largest difference that rounding may make, as a part of the largest logit.

    Args:
        dtype: that the engine computes in.
        scheme: how weights and activations are quantised, if they are.
    """
    base = _FLOAT.get(dtype, _QUANTIZED_ACTIVATIONS)
    return base if scheme in (None, "w4a16") else max(base, _QUANTIZED_ACTIVATIONS)


def save_known_answer(folder: Path, tokens: np.ndarray, logits: np.ndarray, allowed: float) -> SelfTest:
    """Keep an answer in the folder of an exported model, before its files are hashed.

    Args:
        tokens: int64 [T]; ``logits`` [T, V] are the reference's.
        allowed: the largest difference allowed, as a part of the largest logit.
    """
    vocabulary = logits.shape[1]
    columns = np.arange(vocabulary)
    if vocabulary > _ALL_COLUMNS:
        spread = np.linspace(0, vocabulary - 1, _SPREAD).astype(np.int64)
        columns = np.unique(np.concatenate([spread, columns[-_LAST:]]))
    kept = logits[:, columns].astype(np.float32)
    np.savez(folder / FILE, tokens=tokens.astype(np.int64), columns=columns, logits=kept)
    return SelfTest(FILE, len(tokens), allowed)


def load_known_answer(folder: Path, test: SelfTest) -> KnownAnswer:
    """The answer that an artifact keeps.

    Raises:
        UserError: its file is missing or damaged.
    """
    path = folder / test.file
    try:
        with np.load(path, allow_pickle=False) as values:
            answer = KnownAnswer(values["tokens"], values["columns"], values["logits"])
        if answer.logits.shape != (test.tokens, len(answer.columns)) or len(answer.tokens) != test.tokens:
            raise ValueError("its arrays do not fit each other")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is missing or damaged ({' '.join(str(error).split())[:100]})",
            "Export the checkpoint again with sparsedeploy export.",
        ) from error
    return answer


def largest_difference(answer: KnownAnswer, found: np.ndarray) -> float:
    """How far an engine is from the answer, as a part of the answer's largest logit.

    An engine may give log-probabilities, which differ from logits by one number for each token: each row is compared
    less its mean, which no probability depends on.

    Args:
        found: [N, V], for the first N tokens; minus infinity where the engine does not tell.
    """
    expected, found = answer.logits[: len(found)], found[:, answer.columns]
    told = ~np.isneginf(found)
    if not told.any(axis=1).all() or not np.isfinite(found[told]).all():
        return float("inf")
    count = told.sum(axis=1, keepdims=True)
    centered = [
        np.where(told, rows - np.where(told, rows, 0).sum(axis=1, keepdims=True) / count, 0)
        for rows in (expected.astype(np.float64), np.where(told, found, 0).astype(np.float64))
    ]
    largest = max(float(np.abs(centered[0]).max()), 1e-6)
    return float(np.abs(centered[1] - centered[0]).max()) / largest
