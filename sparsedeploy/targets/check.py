"""Does an exported graph compute what its model computes? Run both on the same tokens and compare the logits.

One rule for every target: the check runs past each length at which the model's configuration makes it compute
something else, as far as the export reaches (:mod:`.switches`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sparsedeploy import progress
from sparsedeploy.artifacts.description import Check
from sparsedeploy.artifacts.known_answer import PROMPT, RULED_OUT, STEPS, TOKENS, KnownAnswer, distance
from sparsedeploy.errors import UserError
from sparsedeploy.models.computing import model_errors
from sparsedeploy.targets.switches import check_length, switches

# The prompt is run in parts of this length, then the last tokens one at a time: the two ways in which a runtime calls
# the graph. No length is that of the example that was traced, so a size or a branch that the trace froze shows.
_PART = 509
# float32 logits differ by rounding only, some 1e-6 of the largest one; a wrong mask, position or branch by far more.
TOLERANCE = 1e-3
# Root mean square, as a part of that of the logits: a graph in integers that is wrong moves them by all their size.
INT8_TOLERANCE = 0.5


@dataclass(frozen=True)
class Reference:
    """What a model makes of some tokens.

    Attributes:
        tokens: int64 [1, T].
        rows: the tokens whose logits are kept, int64 [R]: the first ones and those around each switch.
        logits: after each of them, float32 [1, R, V].
    """

    tokens: np.ndarray
    rows: np.ndarray
    logits: np.ndarray

    @property
    def answer(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens [T] and logits [T, V] of the known answer: the first ones, without a gap."""
        count = min(TOKENS, self.tokens.shape[1])
        return self.tokens[0, :count], self.logits[0, :count]

    def known_answer(self, spread: np.ndarray | None = None) -> KnownAnswer:
        """The known answer with every column.

        Args:
            spread: see :class:`~sparsedeploy.artifacts.known_answer.KnownAnswer`; None where it was not measured.
        """
        tokens, logits = self.answer
        return KnownAnswer(
            tokens, np.arange(logits.shape[1]), logits, np.zeros(len(tokens)) if spread is None else spread
        )


@torch.no_grad()
def reference_logits(model: PreTrainedModel, limit: int | None = None) -> Reference:
    """Random tokens and the model's own logits for them, in one pass without a cache.

    The plain attention is asked for: the fused one leaves out the soft cap of Gemma 2.

    Args:
        limit: positions that the export is for.

    Raises:
        UserError: a switch of the model's that is too far for a check.
    """
    config = model.config.get_text_config(decoder=True)
    length = check_length(type(model).__name__, config, limit)
    known = min(TOKENS, length)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.vocab_size, (1, length), generator=generator)
    near = [row for at in switches(config).values() for row in range(at - STEPS, at + STEPS)]
    last = range(length - 2 * STEPS, length)
    rows = torch.tensor(sorted({row for row in (*range(known), *near, *last) if 0 <= row < length}))
    with model_errors(model), _plain_attention(model):
        # The end of the known answer is greedy: an engine that only takes its own choice decodes it too.
        for at in range(min(PROMPT, known), known):
            tokens[0, at] = _logits(model, tokens[:, :at], torch.tensor([at - 1]))[0, 0].argmax()
        logits = _logits(model, tokens, rows)
    return Reference(tokens.numpy(), rows.numpy(), logits.numpy())


@torch.no_grad()
def answer_again(model: PreTrainedModel, reference: Reference) -> np.ndarray:
    """The model's logits [T, V] for the tokens of the known answer, computed once more."""
    tokens = torch.from_numpy(reference.answer[0])[None]
    with _plain_attention(model):
        return _logits(model, tokens, torch.arange(tokens.shape[1]))[0].numpy()


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _logits(model: PreTrainedModel, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """float32 logits after the tokens ``rows``, [1, R, V]."""
    known = inspect.signature(model.forward).parameters
    # Without a mask, some plain attentions look ahead (Moshi's).
    more = {"attention_mask": torch.ones_like(tokens)} if "attention_mask" in known else {}
    if "logits_to_keep" in known:
        return model(input_ids=tokens, use_cache=False, logits_to_keep=rows, **more).logits.float()
    return model(input_ids=tokens, use_cache=False, **more).logits[:, rows].float()


def check_graph(path: Path, reference: Reference) -> Check | None:
    """Run the exported graph over the reference's tokens with a key/value cache and compare the logits.

    Returns:
        The differences found; None when onnxruntime is not installed.

    Raises:
        UserError: the logits differ by more than rounding.
    """
    found = graph_logits(path, reference)
    return None if found is None else compare_logits(found, reference)


def check_integers(path: Path, reference: Reference, spread: np.ndarray) -> Check | None:
    """The same for a graph in integers, against the model whose weights and activations are rounded as there.

    Some processors' 8-bit products saturate, so this only finds a graph that computes something else.

    Args:
        spread: of the known answer, see :class:`~sparsedeploy.artifacts.known_answer.KnownAnswer`.
    """
    found = graph_logits(path, reference)
    if found is None:
        return None
    answer = reference.known_answer(spread)
    tokens, logits = answer.tokens, answer.logits
    difference, allowed = distance(answer, found[0, : len(tokens)], INT8_TOLERANCE)
    if not difference <= allowed:
        raise _differs(difference, 1.0)
    largest = float(np.abs(logits).max())
    return Check(len(tokens), float(np.abs(found[0, : len(tokens)] - logits).max()), largest)


def graph_logits(path: Path, reference: Reference) -> np.ndarray | None:
    """An exported graph's logits [1, R, V] for the reference's rows; None when onnxruntime is not installed."""
    session = _open(path)
    if session is None:
        progress.note("onnxruntime is not installed: the exported graph is not checked against the model")
        return None
    cache = _empty_cache(session)
    names = [entry.name for entry in session.get_outputs()]
    tokens = reference.tokens
    total = tokens.shape[1]
    prompt = len(split_prompt(reference)[0])
    starts = [*range(0, prompt, _PART), *range(prompt, total)]
    logits = []
    for start, stop in progress.track(list(zip(starts, [*starts[1:], total], strict=True)), "check the graph"):
        outputs = session.run(None, {**step_inputs(tokens, start, stop), **cache})
        wanted = reference.rows[(reference.rows >= start) & (reference.rows < stop)] - start
        logits.append(outputs[0][:, wanted])
        cache = {
            name.replace("present", "past_key_values"): value
            for name, value in zip(names[1:], outputs[1:], strict=True)
        }
    return np.concatenate(logits, axis=1)


def graph_perplexity(path: Path, windows: np.ndarray) -> float | None:
    """Perplexity of a graph over token windows [N, T] in ONNX Runtime; None when that is not installed."""
    session = _open(path)
    if session is None:
        return None
    cache = _empty_cache(session)
    losses = []
    for window in progress.track(windows, f"perplexity of {path.parent.name}", total=len(windows)):
        tokens = window[None]
        logits = session.run(["logits"], {**step_inputs(tokens, 0, tokens.shape[1]), **cache})[0][0, :-1]
        scores = torch.from_numpy(logits)
        losses.append(float(torch.nn.functional.cross_entropy(scores, torch.from_numpy(window[1:]))))
    return math.exp(min(sum(losses) / len(losses), 700))


def _open(path: Path) -> Any:
    """An ONNX Runtime session; None when it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _empty_cache(session: Any) -> dict[str, np.ndarray]:
    return {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values")
    }


def split_prompt(reference: Reference) -> tuple[list[int], list[int]]:
    """The prompt and the tokens to run one by one after it."""
    ids: list[int] = reference.tokens[0].tolist()
    steps = min(STEPS, len(ids) // 2)
    return ids[: len(ids) - steps], ids[len(ids) - steps :]


def compare_logits(found: np.ndarray, reference: Reference, tolerance: float = TOLERANCE) -> Check:
    """Differences between an exported model's logits [1, R, V] and the model's own.

    Raises:
        UserError: they differ by more than rounding.
    """
    found, expected = np.maximum(found, RULED_OUT), np.maximum(reference.logits, RULED_OUT)
    difference = float(np.abs(found - expected).max())
    largest = float(np.abs(expected[expected > RULED_OUT]).max(initial=0))
    if not difference <= tolerance * max(largest, 1e-6):
        raise _differs(difference, largest)
    return Check(tokens=reference.tokens.shape[1], largest_difference=difference, largest_logit=largest)


def _differs(difference: float, largest: float) -> UserError:
    return UserError(
        f"the exported graph does not compute what the model computes (logits differ by {difference:.3g}, "
        f"the largest is {largest:.3g})",
        "Its architecture cannot be exported: use a supported one such as Llama, Qwen, Mistral, OPT or Gemma.",
    )


def step_inputs(tokens: np.ndarray, start: int, stop: int) -> dict[str, np.ndarray]:
    """The graph's token and mask inputs for tokens ``start`` to ``stop`` of unpadded sequences [B, T]."""
    batch = tokens.shape[0]
    causal = np.tri(stop - start, stop, start, dtype=np.int64)
    return {
        "input_ids": tokens[:, start:stop],
        "attention_mask": np.ones((batch, stop), np.int64),
        "positions": np.tile(np.arange(start, stop), (batch, 1)),
        "causal_mask": np.tile(causal, (batch, 1, 1, 1)),
    }
