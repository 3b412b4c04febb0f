"""The DeepSparse side of sparsedeploy: runs in the engine's own environment and answers JSON lines.

Needs only the standard library, numpy, onnx and the engine. The protocol is ``export/common/worker_protocol.py``.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from worker_protocol import BadRequest, serve, take_standard_output

PROTOCOL = take_standard_output()

import numpy as np  # noqa: E402 - the engine is imported only after its output has been redirected
import onnx  # noqa: E402
from cached_model import check_product, generate, measure, save_logits  # noqa: E402
from deepsparse.cpu import cpu_architecture  # noqa: E402
from deepsparse.engine import LIB, Engine, Scheduler  # noqa: E402
from deepsparse.utils.onnx import overwrite_onnx_model_inputs_for_kv_cache_models  # noqa: E402
from google.protobuf.message import DecodeError  # noqa: E402
from graph_zeros import count_zeros  # noqa: E402

GRAPH = "model.onnx"
COPY_AGAIN = "Copy the folder again, or export the checkpoint again with sparsedeploy export."
CACHE_BLOCK = 64
PROFILE_RUNS, PROFILE_WARMUP = 20, 5


class CachedEngine:
    """One compiled graph for a fixed number of new tokens, with the engine's internal key/value cache."""

    def __init__(self, graph: Path, cores: int, capacity: int, length: int) -> None:
        path, cached, cache_type = overwrite_onnx_model_inputs_for_kv_cache_models(str(graph), capacity, length, 1)
        if not any(cached):
            raise BadRequest(f"{graph.name} has no key/value cache", "Export with sparsedeploy export.")
        self.length = length
        self.capacity = capacity
        self.engine = Engine(path, 1, cores, cached_outputs=[bool(output) for output in cached])
        self.names = self.engine.input_names
        # The engine keeps the cache itself; its inputs are given with an empty batch.
        self.empty_past = {
            name: np.zeros((0, *shape[1:]), dtype=cache_type)
            for name, shape in zip(self.names, self.engine.input_shapes)  # noqa: B905 - Python 3.9
            if name.startswith("past_key_values")
        }

    def run(self, tokens: list[int], start: int, padding: int, cache: Any) -> np.ndarray:
        """Run new tokens that follow ``start`` tokens in the cache; returns their logits [len(tokens), V].

        ``padding`` slots before the sequence are masked for every token: those already in the cache, or, in the first
        chunk, those that fill it up to ``self.length`` on the left.
        """
        length, capacity, count = self.length, self.capacity, len(tokens)
        blank = length - count
        seen = start + count
        ids = np.zeros((1, length), dtype=np.int64)
        ids[0, blank:] = tokens
        positions = np.zeros((1, length), dtype=np.int64)
        positions[0, blank:] = np.arange(start, seen)
        attention = np.zeros((1, capacity), dtype=np.int64)
        attention[0, capacity - seen - padding :] = 1
        # Columns are aligned right: the new tokens are the last ones.
        causal = np.zeros((1, 1, length, capacity), dtype=np.int64)
        causal[0, 0, blank:, capacity - seen :] = np.tri(count, seen, start, dtype=np.int64)
        slots = np.arange(blank)
        causal[0, 0, slots, capacity - length + slots] = 1
        inputs = {"input_ids": ids, "attention_mask": attention, "positions": positions, "causal_mask": causal}
        inputs.update(self.empty_past)
        logits = self.engine._eng_net.execute_list_out([inputs[name] for name in self.names], cache)[0]
        return logits[0, blank:]


def slots_needed(prompt: int, new_tokens: int, chunk: int) -> int:
    """Slots of the cache for a prompt, its padding to whole chunks and new tokens.

    The engine keeps its cache in blocks of 64 tokens. When there is less room than whole blocks, it answers wrongly or
    damages its memory without a word as soon as a block is full; nor may the cache be smaller than two chunks. Found by
    comparing with torch: none of 426 random prompts, chunks and lengths was wrong with these sizes.
    """
    padded = -(-prompt // chunk) * chunk
    blocks = -(-(padded + new_tokens + 1) // CACHE_BLOCK)
    return max(blocks * CACHE_BLOCK, 2 * chunk) + 1


class Model:
    """A graph compiled twice, for a chunk of the prompt and for one token; both share one cache.

    Args:
        folder: holds ``model.onnx``; copied first, because the engine writes the sizes into the file.
        capacity: slots of the cache, see :func:`slots_needed`.
        chunk: tokens of the prompt that are run at once; 1 or a multiple of 4.
    """

    def __init__(self, folder: Path, cores: int, capacity: int, chunk: int) -> None:
        if chunk != 1 and chunk % 4:
            raise BadRequest(f"the prompt chunk is {chunk}", "It must be 1 or a multiple of 4.")
        self.capacity = capacity
        self.chunk = chunk
        scratch = Path(tempfile.mkdtemp(prefix="graph-"))
        try:
            graph = copy_graph(folder, scratch)
            started = time.perf_counter()
            self.one = CachedEngine(graph, cores, capacity, 1)
            self.many = self.one if chunk == 1 else CachedEngine(graph, cores, capacity, chunk)
            self.compile_seconds = time.perf_counter() - started
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self.cache = LIB.kv_cache(0, 0)
        self.seen = 0
        self.padding = 0

    def prefill(self, prompt: list[int]) -> np.ndarray:
        """Start again with a prompt; returns the logits of all of it, [P, V].

        A prompt that is not whole chunks is padded on the left of its first chunk, and the padding is masked: exact,
        and one run of the engine instead of one for each token that is left over.
        """
        if not prompt:
            raise BadRequest("the prompt is empty", "Give at least one token.")
        self.cache.reset()
        self.seen = 0
        self.padding = -len(prompt) % self.chunk
        parts = []
        end = self.chunk - self.padding
        while self.seen < len(prompt):
            tokens = prompt[self.seen : end]
            parts.append(self.many.run(tokens, self.seen, self.padding, self.cache))
            self.seen, end = end, end + self.chunk
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def decode(self, token: int) -> np.ndarray:
        """Run one more token; returns its logits [V]."""
        logits = self.one.run([token], self.seen, self.padding, self.cache)[0]
        self.seen += 1
        return logits

    def check_room(self, prompt: int, new_tokens: int) -> None:
        """Refuse more tokens than the cache holds."""
        if slots_needed(prompt, new_tokens, self.chunk) > self.capacity:
            raise BadRequest(
                f"{prompt} prompt tokens and {new_tokens} new ones do not fit into a cache of {self.capacity} slots",
                "Load the model for more tokens.",
            )


class Server:
    """The operations; each takes the arguments of a request and returns its result."""

    def __init__(self) -> None:
        self.models: dict[int, Model] = {}

    def info(self) -> dict[str, Any]:
        """Versions and what the engine found out about this CPU."""
        cpu = cpu_architecture()
        return {
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("deepsparse", "numpy", "onnx")},
            "hardware": {
                "vendor": cpu.vendor,
                "instruction_set": cpu.isa,
                "vnni": bool(cpu.vnni),
                "cores": cpu.num_available_physical_cores,
                "sockets": cpu.available_sockets,
                "l2_bytes": cpu.L2_cache_size,
                "l3_bytes": cpu.L3_cache_size,
            },
        }

    def check(self) -> dict[str, Any]:
        """Compile and run a small matrix product and compare it with numpy."""

        def run(model: Any, values: np.ndarray) -> np.ndarray:
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, GRAPH)
                onnx.save(model, path)
                output: np.ndarray = Engine(path, 1, 1).run([values])[0]
            return output

        difference = check_product(run)
        if not difference < 1e-4:
            raise BadRequest(f"the engine computes a matrix product that is off by {difference:.3g}")
        return {**self.info(), "largest_difference": difference}

    def load(self, folder: str, cores: int, prompt_length: int, new_tokens: int, chunk: int) -> dict[str, Any]:
        """Compile a graph for up to so many tokens; the result's ``model`` names it in later requests."""
        model = Model(Path(folder), cores, slots_needed(prompt_length, new_tokens, chunk), chunk)
        number = len(self.models) + 1
        self.models[number] = model
        return {
            "model": number,
            "capacity": model.capacity,
            "compile_seconds": model.compile_seconds,
            "fraction_of_supported_ops": model.many.engine.fraction_of_supported_ops,
        }

    def logits(self, model: int, prompt: list[int], tokens: list[int], folder: str) -> dict[str, Any]:
        return save_logits(self.models[model], prompt, tokens, folder)

    def generate(self, model: int, **arguments: Any) -> Generator[dict[str, Any], None, dict[str, Any]]:
        return generate(self.models[model], **arguments)

    def profile(
        self, folder: str, phase: str, cores: int, prompt_length: int, new_tokens: int, chunk: int, seed: int
    ) -> dict[str, Any]:
        """The time of every operator, for the prompt's last chunk or for one token after it; only once in a process."""
        length = 1 if phase == "decode" else chunk
        padded = -(-prompt_length // chunk) * chunk
        capacity = slots_needed(prompt_length, new_tokens, chunk)
        cached = prompt_length if phase == "decode" else padded - chunk
        operators = profile_graph(Path(folder), cores, capacity, cached, length, seed)
        tokens = "1 token" if length == 1 else f"{length} tokens at once"
        return {"what": f"{tokens} after {cached} in the cache", "operators": operators}

    def measure(self, model: int, prompt: list[int], decode_tokens: int) -> dict[str, Any]:
        return measure(self.models[model], prompt, decode_tokens)


def profile_graph(folder: Path, cores: int, capacity: int, cached: int, length: int, seed: int) -> list[dict[str, Any]]:
    """The engine's own time of every operator, for ``length`` tokens after ``cached`` ones; only once in a process.

    With the internal cache a second run of the engine's profile in the same process ends in damaged memory (found by
    running it), and so does a cache that grows from one iteration to the next, which NM_BENCHMARK_KV_TOKENS prevents.
    """
    os.environ["NM_BENCHMARK_KV_TOKENS"] = str(cached)
    scratch = Path(tempfile.mkdtemp(prefix="graph-"))
    try:
        graph = copy_graph(folder, scratch)
        weights = count_zeros(graph)
        path, outputs, cache_type = overwrite_onnx_model_inputs_for_kv_cache_models(str(graph), capacity, length, 1)
        flags = [bool(output) for output in outputs]
        runs = (PROFILE_RUNS, PROFILE_WARMUP, 1, None, None)
        engine = LIB.deepsparse_engine(path, 1, cores, 1, Scheduler.default.value, None, flags, "external", *runs)
        inputs = profile_inputs(path, cache_type, cached, length, seed)
        # The results hold memory of the engine: they must outlive it.
        results = engine.benchmark_execute(inputs, LIB.kv_cache(0, 0))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    operators = []
    for entry in results[1]["layer_info"]:
        for layer in entry["sub_layer_info"] or [entry]:
            node = "" if layer["canonical_name"] == "<none>" else layer["canonical_name"]
            count, zeros = weights.get(node, (0, 0))
            kind = re.sub(r"(-[0-9.]+%)?[_ ][0-9]+$", "", layer["name"])
            operators.append(
                {
                    "node": node,
                    "kind": kind,
                    "ms": layer["average_run_time_in_ms"],
                    "weights": count,
                    "zeros": zeros,
                    "sparse_kernel": kind.startswith("ks_"),
                }
            )
    return operators


def profile_inputs(path: str, cache_type: Any, cached: int, length: int, seed: int) -> list[np.ndarray]:
    """Random tokens at their positions, nothing masked, and the cache's inputs with an empty batch."""
    model = onnx.load(path, load_external_data=False)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = []
    for entry in model.graph.input:
        if entry.name in constants:
            continue
        shape = [dimension.dim_value for dimension in entry.type.tensor_type.shape.dim]
        if entry.name.startswith("past_key_values"):
            inputs.append(np.zeros((0, *shape[1:]), dtype=cache_type))
        elif entry.name == "positions":
            inputs.append(np.arange(cached, cached + length, dtype=np.int64)[None])
        elif entry.name == "input_ids":
            inputs.append(np.random.default_rng(seed).integers(0, 100, shape))
        else:
            inputs.append(np.ones(shape, dtype=np.int64))
    return inputs


def copy_graph(folder: Path, scratch: Path) -> Path:
    """Copy the graph and link its external data, so that the engine's edits stay in the copy."""
    source = folder / GRAPH
    if not source.is_file():
        raise BadRequest(f"{folder} has no {GRAPH}", "Export the checkpoint again with sparsedeploy export.")
    graph = scratch / GRAPH
    shutil.copyfile(source, graph)
    try:
        model = onnx.load(str(graph), load_external_data=False)
    except DecodeError as error:
        raise BadRequest(f"{source} is not a whole ONNX graph ({error})", COPY_AGAIN) from error
    names = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    for name in sorted(names):
        if not (folder / name).is_file():
            raise BadRequest(f"{folder} lacks {name}, the weights of its {GRAPH}", COPY_AGAIN)
        target = scratch / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(folder / name, target)
        except OSError:
            shutil.copyfile(folder / name, target)
    return graph


if __name__ == "__main__":
    serve(Server(), PROTOCOL)
