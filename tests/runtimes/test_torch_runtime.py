"""PyTorch as a runtime: it runs plain and packed folders in this Python, and needs no installation."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsedeploy.errors import UserError
from sparsedeploy.runtimes.engine import open_model
from sparsedeploy.runtimes.environments import check, install, remove, require, status
from sparsedeploy.runtimes.specification import runtime_for_target
from sparsedeploy.targets.registry import export_checkpoint
from tests.formats.test_transformers import save_sparse_model
from tests.targets.graphs import random_tokens, save_for_export

TOLERANCE = 5e-5


def test_plain_checkpoint(tmp_path: Path) -> None:
    model = save_for_export(tmp_path / "model", "llama")
    ids = random_tokens(1, 16)[0].tolist()
    expected = model(torch.tensor([ids]), use_cache=False).logits[0].detach().numpy()
    with open_model(tmp_path / "model", prompt_length=10, new_tokens=6, cores=1, runtime="torch") as loaded:
        prefill, decode = loaded.logits(ids[:10], ids[10:])
        found = list(loaded.generate(ids[:10], 6, 0.0, 0, []))
        timing = loaded.measure(ids[:10], 3)
        with pytest.raises(UserError, match="10 prompt tokens and 7 new ones are more than the 16 asked for"):
            loaded.measure(ids[:10], 7)
    assert np.abs(np.concatenate([prefill, decode]) - expected).max() < TOLERANCE
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6}
    assert found == model.generate(torch.tensor([ids[:10]]), **settings)[0, 10:].tolist()
    assert len(timing.decode_seconds) == 3


def test_packed_folder_computes_what_the_dense_one_does(tmp_path: Path) -> None:
    save_sparse_model(tmp_path / "dense", "llama", torch.float32)
    export_checkpoint(tmp_path / "dense", "vllm", tmp_path / "packed")
    ids = random_tokens(1, 12)[0].tolist()
    found = []
    for name in ("dense", "packed"):
        with open_model(tmp_path / name, prompt_length=12, new_tokens=1, cores=1, runtime="torch") as loaded:
            found.append(loaded.logits(ids, [])[0])
    assert np.abs(found[0] - found[1]).max() < TOLERANCE


@pytest.mark.slow
def test_compiled_code_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New tokens of a packed model run in compiled code; a prompt after another finds an empty cache."""
    save_sparse_model(tmp_path / "dense", "llama", torch.float32)
    export_checkpoint(tmp_path / "dense", "vllm", tmp_path / "packed")
    ids = random_tokens(1, 16)[0].tolist()
    found = []
    for name, how in (("dense", "eager"), ("packed", "compiled")):
        monkeypatch.setenv("SPARSEDEPLOY_TORCH", how)
        with open_model(tmp_path / name, prompt_length=12, new_tokens=4, cores=1, runtime="torch") as loaded:
            loaded.logits(ids[4:], ids[:4])
            found.append(np.concatenate(loaded.logits(ids[:12], ids[12:])))
            assert len(loaded.measure(ids[:12], 3, 2).decode_seconds) == 3
    assert np.abs(found[0] - found[1]).max() < TOLERANCE
    monkeypatch.setenv("SPARSEDEPLOY_TORCH", "fast")
    with (
        pytest.raises(UserError, match="SPARSEDEPLOY_TORCH is 'fast'"),
        open_model(tmp_path / "dense", prompt_length=12, new_tokens=4, cores=1, runtime="torch"),
    ):
        pass


def test_it_is_always_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(tmp_path))
    assert status("torch").state == install("torch").state == "installed"
    assert require("torch").python == Path(sys.executable)
    assert check("torch").largest_difference < 1e-4
    with pytest.raises(UserError, match="is part of sparsedeploy's own environment"):
        remove("torch")
    assert not (tmp_path / "runtimes" / "torch").exists()


def test_targets_keep_their_own_runtime() -> None:
    assert runtime_for_target("vllm").name == "vllm"
    assert runtime_for_target("checkpoint").name == "torch"
