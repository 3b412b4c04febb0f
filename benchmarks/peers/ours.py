"""Prune a model with sparsedeploy and report where the time went and the peak memory.

    python ours.py MODEL METHOD SPARSITY TOKENS.npy OUTPUT

Prints one JSON line: seconds of forward passes, statistics, solving, and reading and writing; peak memory in bytes, and
that of the imports alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peak import peak_bytes
from transformers import LlamaForCausalLM  # noqa: F401  (loaded at start-up, as llm-compressor does)

from sparsedeploy.calibration.driver import LayerDriver
from sparsedeploy.calibration.samples import CalibrationSet
from sparsedeploy.calibration.statistics import InputStatistics
from sparsedeploy.checkpoint.tensor_writer import TensorWriter
from sparsedeploy.models.layers import StreamedLayers
from sparsedeploy.registry import PRUNERS
from sparsedeploy.workflows import plan
from sparsedeploy.workflows import prune as job
from sparsedeploy.workflows.options import PruneOptions, RunOptions


def main() -> None:
    imports = peak_bytes()
    model, method, sparsity, tokens_file, output = sys.argv[1:]
    seconds = {"forward": 0.0, "statistics": 0.0, "solve": 0.0, "read and write": 0.0}

    def timed(owner: Any, name: str, part: str, inside: str | None = None) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = original(*args, **kwargs)
            spent = time.perf_counter() - start
            seconds[part] += spent
            if inside is not None:
                seconds[inside] -= spent
            return result

        setattr(owner, name, wrapper)

    timed(InputStatistics, "add", "statistics", inside="forward")
    timed(LayerDriver, "_run", "forward")
    timed(TensorWriter, "put", "read and write")
    timed(TensorWriter, "create", "read and write")
    timed(TensorWriter, "sync", "read and write")
    # The next layer is read beside a forward pass: what counts is the waiting for it.
    timed(StreamedLayers, "_take", "read and write")
    timed(StreamedLayers, "_load_surroundings", "read and write")
    timed(job, "complete", "read and write")
    timed(plan, "model_sha256", "read and write")
    chosen = PRUNERS.get(method)
    solve = chosen.function

    def timed_solve(*args: Any) -> Any:
        start = time.perf_counter()
        result = solve(*args)
        seconds["solve"] += time.perf_counter() - start
        return result

    object.__setattr__(chosen, "function", timed_solve)
    tokens = torch.from_numpy(np.load(tokens_file))
    # The tokens are given: no text, no tokenizer.
    plan.calibration_set = lambda *args, **kwargs: CalibrationSet(tokens, "given", 0)
    start = time.perf_counter()
    options = PruneOptions(sparsity=float(sparsity), method=method)
    job.prune(model, Path(output), options, RunOptions(device="cpu"))
    total = time.perf_counter() - start
    seconds["rest"] = total - sum(seconds.values())
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes(), "imports_bytes": imports}))


if __name__ == "__main__":
    main()
