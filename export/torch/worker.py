"""PyTorch as a runtime: transformers runs a folder as it is, in the Python that sparsedeploy itself runs in.

The protocol is ``export/common/worker_protocol.py``.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from worker_protocol import BadRequest, serve, take_standard_output

PROTOCOL = take_standard_output()

import numpy as np  # noqa: E402 - imported only after standard output has been redirected
import torch  # noqa: E402
from cached_model import generate, save_logits  # noqa: E402
from hf_model import HfModel  # noqa: E402

from sparsedeploy.errors import UserError  # noqa: E402
from sparsedeploy.models.loading import load_model  # noqa: E402


class Server:
    """The operations; each takes the arguments of a request and returns its result."""

    def __init__(self) -> None:
        self.models: dict[int, HfModel] = {}

    def info(self) -> dict[str, Any]:
        """Versions and the cores that this process may use."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return {
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "hardware": {"instruction_set": torch.backends.cpu.get_cpu_capability(), "cores": cores},
        }

    def check(self) -> dict[str, Any]:
        """Run a small matrix product and compare it with numpy."""
        weights = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)
        values = np.ones((1, 32), dtype=np.float32)
        found = (torch.from_numpy(values) @ torch.from_numpy(weights)).numpy()
        difference = float(np.abs(found - values @ weights).max())
        if not difference < 1e-4:
            raise BadRequest(f"torch computes a matrix product that is off by {difference:.3g}")
        return {**self.info(), "largest_difference": difference}

    def load(
        self, folder: str, cores: int, prompt_length: int, new_tokens: int, chunk: int, batch: int = 1
    ) -> dict[str, Any]:
        """Load a folder in its own dtype; the result's ``model`` names it later. A prompt is run whole."""
        torch.set_num_threads(cores)
        started = time.perf_counter()
        try:
            model = load_model(Path(folder))
        except UserError as error:
            raise BadRequest(error.message, error.fix) from error
        number = len(self.models) + 1
        self.models[number] = HfModel(model, prompt_length + new_tokens)
        seconds = time.perf_counter() - started
        return {"model": number, "capacity": prompt_length + new_tokens, "compile_seconds": seconds}

    def logits(self, model: int, prompt: list[int], tokens: list[int], folder: str) -> dict[str, Any]:
        return save_logits(self.models[model], prompt, tokens, folder)

    def generate(self, model: int, **arguments: Any) -> Generator[dict[str, Any], None, dict[str, Any]]:
        return generate(self.models[model], **arguments)

    def measure(self, model: int, prompt: list[int], decode_tokens: int, batch: int = 1) -> dict[str, Any]:
        return self.models[model].measure(prompt, decode_tokens, batch)


if __name__ == "__main__":
    serve(Server(), PROTOCOL)
