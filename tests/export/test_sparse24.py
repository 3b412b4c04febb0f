"""The 2:4 format of vLLM 0.8 to 0.18: what the file holds, read back here and, where installed, by its own library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsedeploy.errors import UserError
from sparsedeploy.export.artifact import load_artifact
from sparsedeploy.export.sparse24 import compress, decompress
from sparsedeploy.export.targets import export_checkpoint
from sparsedeploy.models.structure import find_decoder_stack
from sparsedeploy.pruning.patterns import keep_n_of_m
from sparsedeploy.runtimes.engine import open_model
from tests.small_models import byte_tokenizer, random_model, save_model


def save_two_of_four(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A small model whose decoder linears are 2:4; returns its weights."""
    model = random_model("llama").to(dtype)
    for linear in find_decoder_stack(model).all_linears().values():
        linear.weight.data[~keep_n_of_m(linear.weight.detach().float().abs(), 2, 4)] = 0
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_bits_and_values_by_hand() -> None:
    weight = torch.tensor([[0.0, 5.0, 0.0, 7.0, 1.0, 0.0, 0.0, 0.0], [0.0] * 8])
    tensors = compress("name", weight)
    # Lowest bit first; a group of zeros keeps its first two places.
    assert tensors["bitmask"].tolist() == [[0b00111010], [0b00110011]]
    assert tensors["compressed"].tolist() == [[5.0, 7.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert tensors["shape"].tolist() == [[2], [8]]
    assert torch.equal(decompress(tensors), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_checkpoint(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = save_two_of_four(tmp_path / "checkpoint", dtype)
    artifact = export_checkpoint(tmp_path / "checkpoint", "vllm", tmp_path / "out", {"format": "sparse24"})
    assert load_artifact(tmp_path / "out", verify=True) == artifact
    assert (artifact.target, artifact.engine.version) == ("vllm-sparse24", "0.8 to 0.18")
    found = load_file(tmp_path / "out" / "model.safetensors")
    linears = [name for name in weights if "_proj.weight" in name]
    assert len(linears) == 14
    for name in linears:
        module = name.removesuffix(".weight")
        parts = {part: found.pop(f"{module}.{part}") for part in ("compressed", "bitmask", "shape")}
        assert torch.equal(decompress(parts), weights[name])
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in weights.items() if name not in linears
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["sparsity_config"]["format"] == "sparse-24-bitmask"
    assert config["sparsity_config"]["ignore"] == ["lm_head"]


def test_refusals(tmp_path: Path) -> None:
    save_model(tmp_path / "dense")
    with pytest.raises(UserError, match=r"_proj is not 2:4.*--pattern 2:4"):
        export_checkpoint(tmp_path / "dense", "vllm", tmp_path / "out", {"format": "sparse24"})
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="not a multiple of 8"):
        compress("name", torch.zeros(2, 12))


def test_the_vllm_of_today_is_not_tried(tmp_path: Path) -> None:
    save_two_of_four(tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", "vllm", tmp_path / "out", {"format": "sparse24"})
    with (
        pytest.raises(UserError, match="no runtime here runs an artifact of target 'vllm-sparse24'"),
        open_model(tmp_path / "out", prompt_length=1, new_tokens=1),
    ):
        pass


def test_read_by_its_own_library(tmp_path: Path) -> None:
    """compressed-tensors up to 0.12 or so has the decompressor; later versions dropped it."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    if not hasattr(compressors, "Sparse24BitMaskCompressor"):
        pytest.skip("this compressed-tensors reads the format no more; 0.10.2 does")
    weights = save_two_of_four(tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", "vllm", tmp_path / "out", {"format": "sparse24"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    compressor = compressors.ModelCompressor.from_compression_config(config)
    read = dict(compressor.sparsity_compressor.decompress(str(tmp_path / "out")))
    linears = [name for name in weights if "_proj.weight" in name]
    assert all(torch.equal(read[name], weights[name]) for name in linears)
