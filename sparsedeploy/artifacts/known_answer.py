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


@dataclass(frozen=True)
class KnownAnswer:
    """Tokens and what the model makes of them.

    Attributes:
        tokens: int64 [T].
        columns: the vocabulary's ids whose logits are kept, int64 [C].
        logits: after each token, float32 [T, C].
        spread: how far a right engine may be from that after each token, as :func:`row_differences`, measured at the
            export, float32 [T]; zeros where it was not measured.
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


def distance(answer: KnownAnswer, found: np.ndarray, allowed: float, steps: int = 0) -> tuple[float, float]:
    """How far an engine is from the answer, and how far a right one may be.

    Where activations are rounded, right engines differ by as much as rounding itself makes, and on a few tokens, where
    one number more or less decides, by much more. So what is compared with the spread that was measured is the middle
    one of the differences of the prompt, that of the tokens after it, and the smallest one of all. What is worse is
    returned.

    Args:
        found: see :func:`largest_difference`.
        allowed: what is allowed where no spread was measured, or a smaller one.
        steps: how many of the last tokens the engine has run one by one.
    """
    if not answer.spread.any():
        return largest_difference(answer, found), allowed
    rows, spread = row_differences(answer, found), answer.spread[: len(found)].astype(np.float64)
    prompt = len(rows) - steps
    parts = [part for part in (slice(prompt), slice(prompt, None)) if len(rows[part])]
    pairs = [(_middle(rows[part]), _room(len(rows[part])) * _middle(spread[part])) for part in parts]
    pairs.append((float(rows.min()), _room(len(rows)) * float(spread.min())))
    bounded = [(difference, max(limit, allowed)) for difference, limit in pairs]
    return max(bounded, key=lambda pair: pair[0] / pair[1] if np.isfinite(pair[0]) else np.inf)


def _middle(values: np.ndarray) -> float:
    """The lower median."""
    return float(np.sort(values)[(len(values) - 1) // 2])


def _room(count: int) -> float:
    """How far a right engine may be beyond the spread that was measured, as a multiple of it, by ``count`` tokens.

    It rounds in other places than the computations by which the spread was measured, and a few tokens tell less.
    """
    return 1.5 + 3 / count


def row_differences(answer: KnownAnswer, found: np.ndarray) -> np.ndarray:
    """Root mean square of the difference after each token, as a part of that of the answer's logits, float64 [N].

    Args:
        found: see :func:`largest_difference`. Where it tells some of the logits, the difference is theirs.
    """
    expected, given, told = _centered(answer, found)
    return np.sqrt(np.square(given - expected).sum(axis=1) / told.sum(axis=1)) / _row_sizes(answer, len(found))


def _row_sizes(answer: KnownAnswer, count: int) -> np.ndarray:
    """Root mean square of the first rows of logits less each row's mean, float64 [count]."""
    possible = answer.logits[:count] >= RULED_OUT
    squares = np.square(_less_mean(answer.logits[:count], possible)).sum(axis=1)
    return np.sqrt(np.maximum(squares / possible.sum(axis=1), 1e-12))


def largest_difference(answer: KnownAnswer, found: np.ndarray) -> float:
    """How far an engine is from the answer, as a part of the answer's largest logit.

    An engine may give log-probabilities, which differ from logits by one number for each token: each row is compared
    less its mean, which no probability depends on.

    Args:
        found: [N, V], for the first N tokens; minus infinity where the engine does not tell.

    Returns:
        Infinity where something is not a number, or where a token that the model rules out is possible.
    """
    expected, given, _ = _centered(answer, found)
    return float(np.abs(given - expected).max()) / max(float(np.abs(expected).max()), 1e-6)


def _centered(answer: KnownAnswer, found: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both logits less each row's mean, float64 [N, C], and where they are told; infinite if ``found`` is none."""
    expected, found = answer.logits[: len(found)], found[:, answer.columns]
    ruled_out = expected < RULED_OUT
    told = ~(found < RULED_OUT) & ~ruled_out
    if (found[ruled_out] > RULED_OUT).any() or not told.any(axis=1).all() or not np.isfinite(found[told]).all():
        return expected.astype(np.float64), np.full(expected.shape, np.inf), np.ones(expected.shape, bool)
    return _less_mean(expected, told), _less_mean(found, told), told


def _less_mean(rows: np.ndarray, told: np.ndarray) -> np.ndarray:
    """Rows [N, C] less the mean of what is told of each, float64; zero elsewhere."""
    values = np.where(told, rows, 0).astype(np.float64)
    return np.where(told, values - values.sum(axis=1, keepdims=True) / told.sum(axis=1, keepdims=True), 0)
