"""Operator times of ONNX Runtime: what is taken from its events, and a profile in the real engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from sparsedeploy.errors import UserError
from sparsedeploy.resources import shipped
from sparsedeploy.runtimes.engine import find_deployment
from sparsedeploy.runtimes.environments import require
from sparsedeploy.speed.layer_profile import profile_deployment
from sparsedeploy.targets.registry import export_checkpoint
from tests.formats.test_transformers import save_sparse_model
from tests.small_models import byte_tokenizer


@pytest.fixture
def profile_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("onnxruntime")
    monkeypatch.syspath_prepend(str(shipped("export") / "common"))
    import onnxruntime_profile

    yield onnxruntime_profile
    for name in ("onnxruntime_profile", "graph_zeros", "hf_model", "worker_protocol"):
        sys.modules.pop(name, None)


def event(name: str, ts: int, dur: int, kind: str | None = None) -> dict[str, Any]:
    values: dict[str, Any] = {"name": name, "ts": ts, "dur": dur, "cat": "Session"}
    if kind is not None:
        values.update(cat="Node", name=f"{name}_kernel_time", args={"op_name": kind})
    return values


def test_only_the_wanted_runs_count(profile_module: Any) -> None:
    """Runs fill the cache and are of interest by turns; the first two of those are warm-up."""
    events = [event("session_initialization", 0, 5)]
    for run, dur in enumerate((900, 900, 900, 7000, 900, 9000)):
        at = 100 + run * 10_000
        events.append(event("model_run", at, 9500))
        events.append(event("/model/layers.0/mlp/up_proj/MatMul", at + 10, dur, "MatMul"))
        events.append(event("/lm_head/MatMul", at + 9000, 100, "MatMul"))
    found = profile_module.summarize(events, {"/lm_head/MatMul": (50, 5)}, skip=2, every=2)
    assert [(one["node"], one["ms"], one["weights"], one["zeros"]) for one in found] == [
        ("/model/layers.0/mlp/up_proj/MatMul", 8.0, 0, 0),
        ("/lm_head/MatMul", 0.1, 50, 5),
    ]


@pytest.mark.slow
def test_profile_in_the_real_engine(tmp_path: Path) -> None:
    try:
        require("onnxruntime")
    except UserError as error:
        pytest.skip(f"{error} (1.2 GB)")
    import torch

    save_sparse_model(tmp_path / "checkpoint", "llama", torch.float32)
    byte_tokenizer().save_pretrained(tmp_path / "checkpoint")
    artifact = export_checkpoint(tmp_path / "checkpoint", "onnxruntime", tmp_path / "out")
    options = {"cores": 1, "prompt_length": 6, "new_tokens": 4, "chunk": 8, "seed": 0}
    profile = profile_deployment("out", find_deployment(tmp_path / "out"), "decode", **options)
    assert profile.reason is None
    assert profile.what == "1 token after 6 in the cache"
    assert [part.part for part in profile.parts] == [*map(str, range(artifact.shapes.layers)), "outside"]
    assert sum(part.weights for part in profile.parts[:-1]) == artifact.sparsity.weights
    assert sum(part.zeros for part in profile.parts[:-1]) == artifact.sparsity.zeros > 0
    assert profile.total_ms > 0
