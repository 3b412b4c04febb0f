"""Pruning from the files, one layer at a time: the same bits as in memory, and safe against a kill."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsedeploy.allocation import allocate
from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.calibration.text import calibration_set
from sparsedeploy.errors import UserError
from sparsedeploy.folders import JOURNAL
from sparsedeploy.models.layers import StreamedLayers
from sparsedeploy.models.loading import load_config, load_model
from sparsedeploy.models.tensor_files import TensorFiles
from sparsedeploy.pruning.layers import prune_model
from sparsedeploy.registry import ALLOCATORS, PRUNERS
from sparsedeploy.workflows.options import PruneOptions, RunOptions
from sparsedeploy.workflows.prune import prune
from tests.small_models import FAMILIES, save_model

CPU = torch.device("cpu")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return str(path)


def options(text: str, method: str = "sparsegpt", **more: object) -> PruneOptions:
    calibration = CalibrationOptions(data=text, sequences=3, length=32)
    return PruneOptions(**{"sparsity": 0.6, "method": method, "allocation": "owl", "calibration": calibration, **more})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_masks_and_weights_as_in_memory(family: str, dtype: torch.dtype, tmp_path: Path, text: str) -> None:
    source = save_model(tmp_path / "dense", family, dtype=dtype)
    asked = options(text)
    prune(str(source), tmp_path / "streamed", asked, RunOptions(device="cpu"))
    config = load_config(source)
    tokens = calibration_set(source, config, asked.calibration).tokens
    model = load_model(source)
    method_options = PRUNERS.get("sparsegpt").make_options()
    plan = allocate(model, tokens, 0.6, None, "owl", ALLOCATORS.get("owl").make_options())
    pruned = prune_model(model, tokens, plan, "sparsegpt", method_options)
    streamed = load_model(tmp_path / "streamed")
    for name, module in pruned.items():
        assert torch.equal(model.get_submodule(name).weight, streamed.get_submodule(name).weight)
        assert not streamed.get_submodule(name).weight[~module.mask].any()


def test_only_one_layer_is_ever_in_memory(tmp_path: Path) -> None:
    source = StreamedLayers(save_model(tmp_path / "dense", num_hidden_layers=4), device=CPU)

    def loaded() -> list[int]:
        return [
            index
            for index, layer in enumerate(source.stack.layers)
            if not any(parameter.is_meta for parameter in layer.parameters())
        ]

    assert loaded() == []
    for index in (0, 1, 3):
        with source.layer(index):
            assert loaded() == [index]
    assert loaded() == []


_KILLED = """
import os, signal, sys
from pathlib import Path
from sparsedeploy.checkpoint import journal, tensor_writer
from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.workflows.options import PruneOptions, RunOptions
from sparsedeploy.workflows.prune import prune

source, output, text, where, count, resume = sys.argv[1:]
owner, name = {"tensor": (tensor_writer.TensorWriter, "_write"), "journal": (journal.Journal, "_append")}[where]
original, calls = getattr(owner, name), 0

def write(self, *args):
    global calls
    calls += 1
    if calls == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, *args)

setattr(owner, name, write)
calibration = CalibrationOptions(data=text, sequences=3, length=32)
options = PruneOptions(sparsity=0.6, method="sparsegpt", allocation="owl", calibration=calibration)
prune(source, Path(output), options, RunOptions(device="cpu", resume=resume == "resume"))
"""


def killed(
    source: Path,
    output: Path,
    text: str,
    where: str,
    count: int,
    resume: bool = False,
) -> int:
    """Run in a process of its own that kills itself just before the given write; its return code."""
    arguments = [str(source), str(output), text, where, str(count), "resume" if resume else "fresh"]
    command = [sys.executable, "-c", _KILLED, *arguments]
    return subprocess.run(
        command, check=False, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ).returncode


@pytest.mark.parametrize(("where", "count"), [("journal", 2), ("tensor", 9), ("journal", 3), ("tensor", 25)])
def test_a_killed_run_resumes_to_identical_bytes(where: str, count: int, tmp_path: Path, text: str) -> None:
    source = save_model(tmp_path / "dense", dtype=torch.bfloat16)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    prune(str(source), whole, options(text), RunOptions(device="cpu"))
    assert killed(source, resumed, text, where, count) == -signal.SIGKILL
    assert not resumed.exists()
    prune(str(source), resumed, options(text), RunOptions(device="cpu", resume=True))
    assert contents(resumed) == contents(whole)
    assert not list(tmp_path.glob(".*"))


def test_a_changed_request_refuses_to_resume_and_says_which(tmp_path: Path, text: str) -> None:
    source = save_model(tmp_path / "dense")
    output = tmp_path / "out"
    assert killed(source, output, text, "tensor", 20) == -signal.SIGKILL
    before = contents(tmp_path / ".out.partial")
    changed = options(text, method_options={"block": 64})
    with pytest.raises(UserError, match=r"cannot resume: method_options changed .*block was 128, is 64"):
        prune(str(source), output, changed, RunOptions(device="cpu", resume=True))
    calibration = CalibrationOptions(data=text, sequences=3, length=32, seed=1)
    with pytest.raises(UserError, match="cannot resume: calibration changed"):
        prune(str(source), output, options(text, calibration=calibration), RunOptions(device="cpu", resume=True))
    other = save_model(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="cannot resume: model_sha256 changed"):
        prune(str(other), output, options(text), RunOptions(device="cpu", resume=True))
    assert contents(tmp_path / ".out.partial") == before
    prune(str(source), output, options(text), RunOptions(device="cpu", resume=True))


def test_resume_without_an_interrupted_run_starts_one(tmp_path: Path, text: str) -> None:
    source = save_model(tmp_path / "dense")
    prune(str(source), tmp_path / "out", options(text), RunOptions(device="cpu", resume=True))
    assert (tmp_path / "out" / "sparsity.json").is_file()
    assert not (tmp_path / "out" / JOURNAL).exists()


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    source = save_model(tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, source / "model-extra.safetensors")
    both = {"lm_head.weight": "model-extra.safetensors", "model.norm.weight": "model.safetensors"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": both}))
    with pytest.raises(UserError, match=r"tensor lm_head\.weight is in two shards: model-extra.*and model\.safe"):
        TensorFiles(source)
    (source / "model-extra.safetensors").unlink()
    gone = {"metadata": {}, "weight_map": {"a": "gone.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(gone))
    (source / "model.safetensors").rename(source / "one.safetensors")
    with pytest.raises(UserError, match=r"names gone\.safetensors, which is missing"):
        TensorFiles(source)
    (source / "model.safetensors.index.json").unlink()
    (source / "one.safetensors").rename(source / "model.safetensors")
    for damage in (
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: b"",
    ):
        data = (source / "model.safetensors").read_bytes()
        (source / "model.safetensors").write_bytes(damage(data))
        with pytest.raises(UserError, match=r"model\.safetensors is truncated or corrupt"):
            TensorFiles(source)
        (source / "model.safetensors").write_bytes(data)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match=r"up_proj\.weight in the type I8"):
        prune(str(source), tmp_path / "out", PruneOptions(sparsity=0.5, method="magnitude"), RunOptions(device="cpu"))
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
