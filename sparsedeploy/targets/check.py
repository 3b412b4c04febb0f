"""Does an exported graph compute what its model computes? Run both on the same tokens and compare the logits.

One rule for every target: the check runs past each length at which the model's configuration makes it compute
something else, as far as the export reaches (:mod:`.switches`).
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sparsedeploy import progress
from sparsedeploy.artifacts.description import Check
from sparsedeploy.artifacts.known_answer import PROMPT, STEPS, TOKENS
from sparsedeploy.errors import UserError
from sparsedeploy.models.computing import model_errors
from sparsedeploy.targets.switches import check_length, switches

# The prompt is run in parts of this length, then the last tokens one at a time: the two ways in which a runtime calls
# the graph. No length is that of the example that was traced, so a size or a branch that the trace froze shows.
_PART = 509
# float32 logits differ by rounding only, some 1e-6 of the largest one; a wrong mask, position or branch by far more.
TOLERANCE = 1e-3


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
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with model_errors(model):
            # The end of the known answer is greedy: an engine that only takes its own choice decodes it too.
            for at in range(min(PROMPT, known), known):
                tokens[0, at] = _logits(model, tokens[:, :at], torch.tensor([at - 1]))[0, 0].argmax()
            logits = _logits(model, tokens, rows)
    finally:
        model.set_attn_implementation(before)
    return Reference(tokens.numpy(), rows.numpy(), logits.numpy())


def _logits(model: PreTrainedModel, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """float32 logits after the tokens ``rows``, [1, R, V]."""
    known = inspect.signature(model.forward).parameters
    # Without a mask, some plain attentions look ahead (Moshi's).
    more = {"attention_mask": torch.ones_like(tokens)} if "attention_mask" in known else {}
    if "logits_to_keep" in known:
        return model(input_ids=tokens, use_cache=False, logits_to_keep=rows, **more).logits.float()
    return model(input_ids=tokens, use_cache=False, **more).logits[:, rows].float()


def check_graph(path: Path, reference: Reference, tolerance: float = TOLERANCE) -> Check | None:
    """Run the graph with ONNX Runtime, prompt and then token by token with its cache, and compare the logits.

    Args:
        tolerance: the largest difference allowed, as a part of the largest logit.

    Returns:
        The differences found; None when onnxruntime is not installed.

    Raises:
        UserError: the logits differ by more than rounding.
    """
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
    return compare_logits(np.concatenate(logits, axis=1), reference, tolerance)


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
    difference = float(np.abs(found - reference.logits).max())
    largest = float(np.abs(reference.logits).max())
    if not difference <= tolerance * max(largest, 1e-6):
        raise UserError(
            f"the exported graph does not compute what the model computes (logits differ by {difference:.3g}, "
            f"the largest is {largest:.3g})",
            "Its architecture cannot be exported: use a supported one such as Llama, Qwen, Mistral, OPT or Gemma.",
        )
    return Check(tokens=reference.tokens.shape[1], largest_difference=difference, largest_logit=largest)


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
