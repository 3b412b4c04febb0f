"""The operations of a worker whose engine offers a model with a key/value cache: logits, text and timings.

Needs numpy (and onnx for the check). A model here is an object with ``prefill(tokens)`` (start again; logits [P, V]),
``decode(token)`` (one more token; logits [V]) and ``check_room(prompt, new_tokens)`` (refuse what its cache cannot
hold).
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from typing import Any

import numpy as np
from worker_protocol import BadRequest


class Growing:
    """A model whose cache grows with its tokens, up to the ``capacity`` that it was loaded for."""

    capacity: int

    def check_room(self, prompt: int, new_tokens: int) -> None:
        """Refuse more tokens than the model was loaded for."""
        if prompt + new_tokens > self.capacity:
            raise BadRequest(
                f"{prompt} prompt tokens and {new_tokens} new ones are more than the {self.capacity} asked for",
                "Load the model for more tokens.",
            )


def save_logits(model: Any, prompt: list[int], tokens: list[int], folder: str) -> dict[str, Any]:
    """Logits of every prompt token and of every following token, saved in ``folder``."""
    model.check_room(len(prompt), len(tokens))
    prefill = model.prefill(prompt)
    decode = [model.decode(token) for token in tokens]
    return save_arrays({"prefill": prefill, "decode": np.stack(decode) if decode else prefill[:0]}, folder)


def save_arrays(arrays: dict[str, np.ndarray], folder: str) -> dict[str, Any]:
    """The result that names arrays, saved in ``folder``."""
    paths = {}
    for name, array in arrays.items():
        paths[name] = os.path.join(folder, f"{name}.npy")
        np.save(paths[name], array)
    return {"arrays": paths}


def generate(
    model: Any, prompt: list[int], new_tokens: int, temperature: float, seed: int, stop: list[int]
) -> Generator[dict[str, Any], None, dict[str, Any]]:
    """Yield each new token and return all of them; greedy at temperature 0."""
    model.check_room(len(prompt), new_tokens)
    random = np.random.default_rng(seed)
    logits = model.prefill(prompt)[-1]
    tokens: list[int] = []
    while True:
        token = choose(logits, temperature, random)
        tokens.append(token)
        yield {"token": token}
        if token in stop or len(tokens) == new_tokens:
            break
        logits = model.decode(token)
    return {"tokens": tokens, "stopped": tokens[-1] in stop}


def measure(model: Any, prompt: list[int], decode_tokens: int) -> dict[str, Any]:
    """Seconds that a prompt took, and each of the tokens that follow it greedily."""
    model.check_room(len(prompt), decode_tokens)
    clock = time.perf_counter
    started = time.perf_counter()
    token = int(model.prefill(prompt)[-1].argmax())
    prefill = clock() - started
    decode = []
    for _ in range(decode_tokens):
        started = time.perf_counter()
        token = int(model.decode(token).argmax())
        decode.append(clock() - started)
    return {"prefill_seconds": prefill, "decode_seconds": decode}


def measure_batch(run: Any, prompts: Any, decode_tokens: int) -> dict[str, Any]:
    """Seconds that several equal prompts took, and each step of the tokens that follow them greedily.

    Args:
        run: called with the next tokens [B, L], of numpy or torch; returns logits [B, ?, V], the last token's last.
        prompts: tokens [B, L]; the cache is empty.
    """
    seconds = []
    tokens = prompts
    for _ in range(1 + decode_tokens):
        started = time.perf_counter()
        tokens = run(tokens)[:, -1:].argmax(-1)
        seconds.append(time.perf_counter() - started)
    return {"prefill_seconds": seconds[0], "decode_seconds": seconds[1:]}


def choose(logits: np.ndarray, temperature: float, random: np.random.Generator) -> int:
    """The likeliest token, or one drawn with probability softmax(logits / temperature)."""
    if temperature <= 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return int(random.choice(len(weights), p=weights / weights.sum()))


def check_product(run: Any) -> float:
    """The largest difference between an engine's product of two matrices and numpy's.

    Args:
        run: called with an ONNX model (opset 14) that has one input [1, 32], and its value; returns the output [1, 16].
    """
    import onnx

    weights = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)
    values = np.ones((1, 32), dtype=np.float32)
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "check",
        [onnx.helper.make_tensor_value_info("x", kind, [1, 32])],
        [onnx.helper.make_tensor_value_info("y", kind, [1, 16])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)
    return float(np.abs(run(model, values) - values @ weights).max())
