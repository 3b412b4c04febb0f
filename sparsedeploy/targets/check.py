"""Does an exported graph compute what its model computes? Run both on the same tokens and compare the logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sparsedeploy import progress
from sparsedeploy.artifacts.description import Check
from sparsedeploy.errors import UserError

# Prompt first, then one token at a time: the two ways in which a runtime calls the graph. Both lengths differ from the
# example that was traced, so a size or a branch that the trace froze shows.
_PROMPT, _STEPS = 11, 4
# float32 logits differ by rounding only, some 1e-6 of the largest one; a wrong mask, position or branch by far more.
TOLERANCE = 1e-3


@torch.no_grad()
def reference_logits(model: PreTrainedModel, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens [1, T] and the model's own logits [1, T, V] for them, in one pass without a cache.

    The plain attention is asked for: the fused one leaves out the soft cap of Gemma 2.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocabulary, (1, _PROMPT + _STEPS), generator=generator)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits = model(input_ids=tokens, use_cache=False).logits.float().numpy()
    model.set_attn_implementation(before)
    return tokens.numpy(), logits


def check_graph(path: Path, tokens: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> Check | None:
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
    total = tokens.shape[1]
    starts = [0, *range(_PROMPT, total)]
    logits = []
    for start, stop in progress.track(list(zip(starts, [*starts[1:], total], strict=True)), "check the graph"):
        outputs = session.run(None, {**step_inputs(tokens, start, stop), **cache})
        logits.append(outputs[0])
        cache = {
            name.replace("present", "past_key_values"): value
            for name, value in zip(names[1:], outputs[1:], strict=True)
        }
    return compare_logits(np.concatenate(logits, axis=1), expected, tolerance)


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


def split_prompt(tokens: np.ndarray) -> tuple[list[int], list[int]]:
    """The prompt and the tokens to run one by one after it, of :func:`reference_logits`'s tokens."""
    ids: list[int] = tokens[0].tolist()
    return ids[:_PROMPT], ids[_PROMPT:]


def compare_logits(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> Check:
    """Differences between an exported model's logits and the model's own, both [1, T, V].

    Raises:
        UserError: they differ by more than rounding.
    """
    difference = float(np.abs(found - expected).max())
    largest = float(np.abs(expected).max())
    if not difference <= tolerance * max(largest, 1e-6):
        raise UserError(
            f"the exported graph does not compute what the model computes (logits differ by {difference:.3g}, "
            f"the largest is {largest:.3g})",
            "Its architecture cannot be exported: use a supported one such as Llama, Qwen, Mistral, OPT or Gemma.",
        )
    return Check(tokens=expected.shape[1], largest_difference=difference, largest_logit=largest)


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
