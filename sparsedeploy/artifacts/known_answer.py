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
# A token whose logit is below this is ruled out by the model itself, as Chameleon rules out those of images.
RULED_OUT = -1e30
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
# A right engine may be further away than the computations by which the spread was measured.
_ROOM = 1.5


@dataclass(frozen=True)
class KnownAnswer:
    """Tokens and what the model makes of them.

    Attributes:
        tokens: int64 [T].
        columns: the vocabulary's ids whose logits are kept, int64 [C].
        logits: after each token, float32 [T, C].
        spread: how far right computations in integers may be apart after each token, as :func:`row_differences`,
            float32 [T]; zeros where nothing is rounded to levels.
    """

    tokens: np.ndarray
    columns: np.ndarray
    logits: np.ndarray
    spread: np.ndarray


def tolerance(dtype: str, scheme: str | None = None) -> float:
    """The largest difference that rounding may make, as a part of the largest logit.

    Args:
        dtype: that the engine computes in.
        scheme: how weights and activations are quantised, if they are.
    """
    base = _FLOAT.get(dtype, _QUANTIZED_ACTIVATIONS)
    return base if scheme in (None, "w4a16") else max(base, _QUANTIZED_ACTIVATIONS)


def save_known_answer(
    folder: Path, tokens: np.ndarray, logits: np.ndarray, allowed: float, spread: np.ndarray | None = None
) -> SelfTest:
    """Keep an answer in the folder of an exported model, before its files are hashed.

    Args:
        tokens: int64 [T]; ``logits`` [T, V] are the reference's.
        allowed: the largest difference allowed, as a part of the largest logit.
        spread: see :class:`KnownAnswer`; None for zeros.
    """
    vocabulary = logits.shape[1]
    columns = np.arange(vocabulary)
    if vocabulary > _ALL_COLUMNS:
        evenly = np.linspace(0, vocabulary - 1, _SPREAD).astype(np.int64)
        columns = np.unique(np.concatenate([evenly, columns[-_LAST:]]))
    kept = logits[:, columns].astype(np.float32)
    rows = np.zeros(len(tokens)) if spread is None else spread
    np.savez(
        folder / FILE, tokens=tokens.astype(np.int64), columns=columns, logits=kept, spread=rows.astype(np.float32)
    )
    return SelfTest(FILE, len(tokens), allowed)


def load_known_answer(folder: Path, test: SelfTest) -> KnownAnswer:
    """The answer that an artifact keeps.

    Raises:
        UserError: its file is missing or damaged.
    """
    path = folder / test.file
    try:
        with np.load(path, allow_pickle=False) as values:
            # Answers of earlier versions have no spread.
            spread = values["spread"] if "spread" in values else np.zeros(test.tokens)
            answer = KnownAnswer(values["tokens"], values["columns"], values["logits"], spread)
        counts = {len(answer.tokens), len(answer.spread), test.tokens}
        if answer.logits.shape != (test.tokens, len(answer.columns)) or len(counts) > 1:
            raise ValueError("its arrays do not fit each other")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is missing or damaged ({' '.join(str(error).split())[:100]})",
            "Export the checkpoint again with sparsedeploy export.",
        ) from error
    return answer


def distance(answer: KnownAnswer, found: np.ndarray, allowed: float) -> tuple[float, float]:
    """How far an engine is from the answer, and how far a right one may be.

    Where activations are rounded to levels, one value on an edge falls either way, and the tokens after it differ by as
    much as rounding itself makes. So two things are compared with the spread of right computations: all logits, and
    those of the calmest token, which has seen the fewest such values. What is worse is returned.

    Args:
        found: see :func:`largest_difference`; ``allowed`` is what rounding of floating-point numbers may make.
    """
    if not answer.spread.any():
        return largest_difference(answer, found), allowed
    rows, spread = row_differences(answer, found), answer.spread[: len(found)].astype(np.float64)
    sizes = np.square(_centered(answer, found)[0]).mean(axis=1)
    whole = [float(np.sqrt((np.square(each) * sizes).sum() / sizes.sum())) for each in (rows, spread)]
    pairs = [(whole[0], _ROOM * whole[1]), (float(rows.min()), _ROOM * float(spread.min()))]
    bounded = [(difference, max(limit, allowed)) for difference, limit in pairs]
    return max(bounded, key=lambda pair: pair[0] / pair[1] if np.isfinite(pair[0]) else np.inf)


def row_differences(answer: KnownAnswer, found: np.ndarray) -> np.ndarray:
    """Root mean square of the difference after each token, as a part of that of the answer's logits, float64 [N].

    Args:
        found: see :func:`largest_difference`.
    """
    expected, given = _centered(answer, found)
    return np.sqrt(np.square(given - expected).mean(axis=1) / np.maximum(np.square(expected).mean(axis=1), 1e-12))


def largest_difference(answer: KnownAnswer, found: np.ndarray) -> float:
    """How far an engine is from the answer, as a part of the answer's largest logit.

    An engine may give log-probabilities, which differ from logits by one number for each token: each row is compared
    less its mean, which no probability depends on.

    Args:
        found: [N, V], for the first N tokens; minus infinity where the engine does not tell.

    Returns:
        Infinity where something is not a number, or where a token that the model rules out is possible.
    """
    expected, given = _centered(answer, found)
    return float(np.abs(given - expected).max()) / max(float(np.abs(expected).max()), 1e-6)


def _centered(answer: KnownAnswer, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both logits less each row's mean, float64 [N, C]; zero where nothing is told, infinite if ``found`` is none."""
    expected, found = answer.logits[: len(found)], found[:, answer.columns]
    ruled_out = expected < RULED_OUT
    told = ~(found < RULED_OUT) & ~ruled_out
    if (found[ruled_out] > RULED_OUT).any() or not told.any(axis=1).all() or not np.isfinite(found[told]).all():
        return expected.astype(np.float64), np.full(expected.shape, np.inf)
    count = told.sum(axis=1, keepdims=True)
    centered = [
        np.where(told, rows - rows.sum(axis=1, keepdims=True) / count, 0)
        for rows in (np.where(told, one, 0).astype(np.float64) for one in (expected, found))
    ]
    return centered[0], centered[1]
