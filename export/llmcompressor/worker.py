"""The llm-compressor side of sparsedeploy: runs in its environment, prunes by recipe, quantises, answers JSON lines."""

from __future__ import annotations

import os
import platform
import queue
import re
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from worker_protocol import BadRequest, serve, take_standard_output

PROTOCOL = take_standard_output()

import numpy as np  # noqa: E402 - imported only after standard output has been redirected
import quantize  # noqa: E402
import torch  # noqa: E402
from llmcompressor.modifiers.pruning.wanda.wanda_sparsify import sparsify_weight  # noqa: E402
from loguru import logger  # noqa: E402
from replay import OtherActivations, load, replay  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

VERSIONS = ("llmcompressor", "compressed-tensors", "torch", "transformers")
# What llm-compressor logs when it is about to change a module.
_STARTS = re.compile(r"(?:Sparsifying|Quantizing) (?:(\d+) module)?")

T = TypeVar("T")
Events = Generator[dict[str, Any], None, dict[str, Any]]


class Server:
    """The operations; each takes the arguments of a request and returns its result."""

    def info(self) -> dict[str, Any]:
        """Versions and the device that llm-compressor will use."""
        device = "cpu"
        if torch.accelerator.is_available():
            device = str(torch.accelerator.current_accelerator())
        return {
            "python": platform.python_version(),
            "versions": {name: version(name) for name in VERSIONS},
            "hardware": {"device": device, "threads": torch.get_num_threads()},
        }

    def check(self) -> dict[str, Any]:
        """Prune a small matrix with llm-compressor's Wanda and compare its product with numpy's."""
        generator = torch.Generator().manual_seed(0)
        linear = torch.nn.Linear(96, 48, bias=False)
        linear.weight.data = torch.randn(48, 96, generator=generator)
        weight = linear.weight.data.numpy().copy()
        inputs = torch.randn(64, 96, generator=generator)
        pruned = sparsify_weight(linear, {linear: inputs.square().sum(0)}, 0.5, 0, 0)
        scores = np.abs(weight) * np.linalg.norm(inputs.numpy(), axis=0)
        rows = np.arange(48)[:, None]
        weight[rows, np.argsort(scores, axis=1, kind="stable")[:, :48]] = 0
        difference = float(np.abs((inputs @ pruned.T).numpy() - inputs.numpy() @ weight.T).max())
        if not difference < 1e-4:
            raise BadRequest(f"llm-compressor prunes a small matrix wrongly (its product is off by {difference:.3g})")
        return {**self.info(), "largest_difference": difference}

    def prune(
        self,
        model: str,
        recipe: str,
        tokens: str,
        modules: list[str],
        output: str,
        dtype: str,
        device: str,
        pipeline: str,
    ) -> Events:
        """Prune a dense model by a recipe; saves the named modules' weights, by module name, as ``output``.

        Args:
            tokens: .npy file with int64 ``[sequences, length]``.
            device: ``cpu`` keeps llm-compressor off accelerators; anything else leaves the choice to it.

        Returns:
            ``seconds`` of pruning and ``runs``, how often the first module saw each sequence: a pass over the text runs
            it twice, to calibrate and, pruned, for the layers behind it.
        """
        _choose_device(device)
        loaded = load(model, dtype)
        sequences = torch.from_numpy(np.load(tokens))
        calls: list[None] = []
        hook = loaded.get_submodule(modules[0]).register_forward_pre_hook(lambda *_: calls.append(None))
        started = time.perf_counter()
        yield from _with_events(lambda: replay(loaded, recipe, sequences, pipeline))
        seconds = time.perf_counter() - started
        hook.remove()
        weights = {name: loaded.get_submodule(name).weight.detach().cpu().contiguous() for name in modules}
        save_file(weights, output)
        return {"seconds": seconds, "runs": len(calls) / len(sequences)}

    def quantize(
        self,
        model: str,
        scheme: str,
        algorithm: str,
        tokens: str | None,
        masks: str,
        windows: str | None,
        probe: str,
        output: str,
        dtype: str,
        device: str,
    ) -> Events:
        """Quantise a pruned model with its masks held, save it compressed, read it back and examine it.

        Args:
            tokens: .npy file of calibration sequences, for the algorithm that needs some.
            masks: safetensors file, module name -> bool ``[rows, columns]``, True where kept.
            windows: .npy file of int64 ``[windows, context]`` to take the perplexity on; None takes none.
            probe: .npy file of int64 ``[T]``, tokens whose logits are taken too; the arrays lie beside it.
            dtype: of what is not quantised; ``auto`` keeps the model's own.

        Returns:
            See :func:`quantize.examine`.
        """
        _choose_device(device)
        kept = load_file(masks)
        sequences = None if tokens is None else torch.from_numpy(np.load(tokens))
        text = None if windows is None else torch.from_numpy(np.load(windows))
        before = None if text is None else quantize.perplexity(load(model), text)
        loaded = load(model, dtype)
        group_size = yield from _with_events(lambda: quantize.quantize(loaded, scheme, algorithm, sequences, kept))
        loaded.save_pretrained(output, save_compressed=True)
        return {
            "group_size": group_size,
            "perplexity_before": before,
            **quantize.examine(output, kept, text, Path(probe)),
        }


def _choose_device(device: str) -> None:
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch has not looked for devices yet


def _with_events(work: Callable[[], T]) -> Generator[dict[str, Any], None, T]:
    """Do the work in a thread, yield the number of modules that llm-compressor starts on, and return its result."""
    lines: queue.Queue[str | None] = queue.Queue()
    sink = logger.add(lambda message: lines.put(message.record["message"]), level="INFO", format="{message}")
    try:
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work)
            future.add_done_callback(lambda _: lines.put(None))
            while (line := lines.get()) is not None:
                if found := _STARTS.match(line):
                    yield {"modules": int(found[1] or 1)}
            try:
                return future.result()
            except OtherActivations as error:
                fix = "Prune with the built-in engine; quantise with --target-option algorithm=round."
                raise BadRequest(str(error), fix) from error
    finally:
        logger.remove(sink)


if __name__ == "__main__":
    serve(Server(), PROTOCOL)
