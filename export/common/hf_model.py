"""A model with transformers' calling convention and its cache, whatever computes it: torch, or Optimum's ONNX Runtime.

A prompt is run whole, then one token at a time. Logits of every position are computed, as in the graphs of the other
runtimes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cached_model import Growing, generate, measure_batch, save_logits
from worker_protocol import BadRequest


class HfModel(Growing):
    """Runs one sequence, or in :meth:`measure` several equal ones.

    Args:
        model: called as ``model(input_ids=, attention_mask=, past_key_values=, use_cache=True)``.
        capacity: tokens that a sequence may have at most.
    """

    def __init__(self, model: Any, capacity: int) -> None:
        self.model = model
        self.capacity = capacity
        self.past: Any = None
        self.seen = 0

    def prefill(self, prompt: list[int]) -> np.ndarray:
        """Start again with a prompt; returns the logits of all of it, [P, V]."""
        if not prompt:
            raise BadRequest("the prompt is empty", "Give at least one token.")
        self._clear()
        return self._numpy(self._run(torch.tensor([prompt])))[0]

    def decode(self, token: int) -> np.ndarray:
        """Run one more token; returns its logits [V]."""
        return self._numpy(self._run(torch.tensor([[token]])))[0, 0]

    def extend(self, tokens: list[int]) -> None:
        """Run more tokens at once."""
        self._run(torch.tensor([tokens]))

    def measure(self, prompt: list[int], decode_tokens: int, batch: int) -> dict[str, Any]:
        """Seconds that ``batch`` copies of a prompt took, and each step of the tokens that follow them greedily."""
        self.check_room(len(prompt), decode_tokens)
        self._clear()
        return measure_batch(self._run, torch.tensor([prompt] * batch), decode_tokens)

    def _clear(self) -> None:
        self.past, self.seen = None, 0

    @torch.no_grad()
    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, L, V] of the next tokens [B, L]."""
        self.seen += ids.shape[1]
        mask = torch.ones(len(ids), self.seen, dtype=torch.int64)
        output = self.model(input_ids=ids, attention_mask=mask, past_key_values=self.past, use_cache=True)
        self.past = output.past_key_values
        logits: torch.Tensor = output.logits
        return logits

    @staticmethod
    def _numpy(logits: torch.Tensor) -> np.ndarray:
        array: np.ndarray = logits.float().numpy()
        return array


class HfServer:
    """The operations on loaded models; each takes the arguments of a request and returns its result."""

    def __init__(self) -> None:
        self.models: dict[int, HfModel] = {}

    def open(self, folder: Path, cores: int) -> Any:
        """The folder's model, on ``cores`` threads; each engine has its own way."""
        raise NotImplementedError

    def wrap(self, model: Any, capacity: int) -> HfModel:
        """What runs a loaded model."""
        return HfModel(model, capacity)

    def load(
        self, folder: str, cores: int, prompt_length: int, new_tokens: int, chunk: int, batch: int = 1
    ) -> dict[str, Any]:
        """Load a folder; the result's ``model`` names it later. A prompt is run whole, whatever ``chunk``."""
        started = time.perf_counter()
        model = self.open(Path(folder), cores)
        seconds = time.perf_counter() - started
        number = len(self.models) + 1
        self.models[number] = self.wrap(model, prompt_length + new_tokens)
        return {"model": number, "capacity": prompt_length + new_tokens, "compile_seconds": seconds}

    def logits(self, model: int, prompt: list[int], tokens: list[int], folder: str) -> dict[str, Any]:
        return save_logits(self.models[model], prompt, tokens, folder)

    def generate(self, model: int, **arguments: Any) -> Generator[dict[str, Any], None, dict[str, Any]]:
        return generate(self.models[model], **arguments)

    def measure(self, model: int, prompt: list[int], decode_tokens: int, batch: int = 1) -> dict[str, Any]:
        return self.models[model].measure(prompt, decode_tokens, batch)


def usable_cores() -> int | None:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
