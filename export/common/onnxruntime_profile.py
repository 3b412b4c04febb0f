"""The time of every operator from ONNX Runtime's own profile."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from graph_zeros import count_zeros
from hf_model import HfModel

RUNS, WARMUP = 10, 2
_SUFFIX = "_kernel_time"


def profile_graph(
    open_folder: Any, folder: Path, cores: int, cached: int, length: int, seed: int
) -> list[dict[str, Any]]:
    """The mean time of every operator for ``length`` tokens after ``cached`` ones, in the order of running.

    Args:
        open_folder: called with the folder, the cores and session options; returns Optimum's model.
    """
    random = np.random.default_rng(seed)
    scratch = Path(tempfile.mkdtemp(prefix="profile-"))
    try:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(scratch / "ort")
        loaded = open_folder(folder, cores, options)
        model = HfModel(loaded, cached + length)
        for _ in range(WARMUP + RUNS):
            if cached:
                model.prefill(random.integers(0, 100, cached).tolist())
            else:
                model.past, model.seen = None, 0
            model.extend(random.integers(0, 100, length).tolist())
        events = json.loads(Path(loaded.session.end_profiling()).read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    every = 2 if cached else 1  # each run of interest follows one that fills the cache
    return summarize(events, count_zeros(folder / "model.onnx"), skip=WARMUP * every, every=every)


def summarize(
    events: list[dict[str, Any]], weights: dict[str, tuple[int, int]], *, skip: int, every: int
) -> list[dict[str, Any]]:
    """Mean times of the nodes in the runs from number ``skip`` on, the last of each ``every`` runs."""
    runs = sorted((event for event in events if event["name"] == "model_run"), key=lambda event: event["ts"])
    wanted = [run for at, run in enumerate(runs) if at >= skip and at % every == every - 1]
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX)]
    times: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for event in sorted(nodes, key=lambda event: event["ts"]):
        if any(run["ts"] <= event["ts"] <= run["ts"] + run["dur"] for run in wanted):
            name = event["name"].removesuffix(_SUFFIX)
            times[name].append(event["dur"] / 1e3)
            kinds[name] = event["args"]["op_name"]
    operators = []
    for name, values in times.items():
        count, zeros = weights.get(name, (0, 0))
        operators.append(
            {
                "node": name,
                "kind": kinds[name],
                "ms": sum(values) / len(wanted),
                "weights": count,
                "zeros": zeros,
                "sparse_kernel": False,
            }
        )
    return operators
