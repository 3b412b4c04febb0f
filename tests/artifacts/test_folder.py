"""What every export starts from: a folder that is refused in the same words whatever the target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsedeploy.artifacts.description import ARTIFACT_FILE
from sparsedeploy.artifacts.folder import describe_folder, open_checkpoint
from sparsedeploy.errors import UserError
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.low_rank import LowRank, save_adapter
from sparsedeploy.targets.registry import export_checkpoint
from tests.formats.test_transformers import save_sparse_model
from tests.small_models import random_model, save_model

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def test_what_is_opened(folder: Path) -> None:
    opened = open_checkpoint(folder)
    assert (opened.folder, opened.config.model_type) == (folder, "llama")
    assert (opened.source.name, opened.source.sha256) == ("model", model_sha256(folder))
    model, expected = opened.load(), random_model("llama").state_dict()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(torch.equal(tensor, expected[name].float()) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("target", ["deepsparse", "vllm"])
def test_quantised_weights_are_refused_for_every_target(folder: Path, tmp_path: Path, target: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.qweight"] = tensors.pop(f"{UP}.weight").int()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="model is quantised"):
        export_checkpoint(folder, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_for_targets_that_ask_for_it(folder: Path, tmp_path: Path) -> None:
    rows, columns = random_model("llama").get_parameter(f"{UP}.weight").shape
    save_adapter(folder / "adapter", {UP: LowRank(torch.ones(2, columns), torch.ones(rows, 2))}, "model")
    with pytest.raises(UserError, match="adapter that is not merged"):
        export_checkpoint(folder, "vllm", tmp_path / "out")
    assert open_checkpoint(folder, adapters=True).folder == folder


def test_packed_weights_without_their_description_are_refused(tmp_path: Path) -> None:
    save_sparse_model(tmp_path / "dense", "llama", torch.float32)
    export_checkpoint(tmp_path / "dense", "vllm", tmp_path / "packed")
    (tmp_path / "packed" / ARTIFACT_FILE).unlink()
    with pytest.raises(UserError, match=r"is packed and its artifact\.json is missing\. Copy the whole folder again"):
        describe_folder(tmp_path / "packed")
