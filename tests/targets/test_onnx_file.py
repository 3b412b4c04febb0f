"""Weights in the ONNX file: zeros survive bit by bit, large models put them in one side file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from sparsedeploy.errors import UserError
from sparsedeploy.models.structure import find_decoder_stack
from sparsedeploy.targets.check import check_graph, reference_logits
from sparsedeploy.targets.kv_graph import KVCacheGraph
from sparsedeploy.targets.onnx_file import LARGEST_SINGLE_FILE, count_weights, write_onnx
from tests.small_models import random_model


def pruned_model(**changes: object) -> torch.nn.Module:
    """A small Llama with 70 % of each linear at zero, one negative zero, and two linears that are equal."""
    model = random_model("llama", initializer_range=0.15, **changes).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for linear in find_decoder_stack(model).all_linears().values():
        linear.weight[torch.rand(linear.weight.shape, generator=generator) < 0.7] = 0
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight.copy_(attention.v_proj.weight)
    attention.q_proj.weight[0, 0] = -0.0
    return model


def zeros_of(model: torch.nn.Module) -> int:
    return sum(int((linear.weight == 0).sum()) for linear in find_decoder_stack(model).all_linears().values())


@pytest.mark.parametrize("threshold", [0, LARGEST_SINGLE_FILE], ids=["side file", "one file"])
def test_zeros_survive(tmp_path: Path, threshold: int) -> None:
    model = pruned_model(tie_word_embeddings=True)
    reference = reference_logits(model)
    files = write_onnx(KVCacheGraph(model), tmp_path, largest_single_file=threshold)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    linears = find_decoder_stack(model).all_linears()
    counted = count_weights(tmp_path / "model.onnx", linears)
    assert counted.zeros == zeros_of(model) > 0.65 * counted.weights
    assert counted.weights == sum(linear.weight.numel() for linear in linears.values())
    check = check_graph(tmp_path / "model.onnx", reference)
    assert check is not None
    assert check.largest_difference < 1e-4 < check.largest_logit


def test_side_file_holds_every_constant(tmp_path: Path) -> None:
    model = pruned_model()
    assert write_onnx(KVCacheGraph(model), tmp_path, largest_single_file=1000) == ["model.onnx", "model.data"]
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    size = (tmp_path / "model.data").stat().st_size
    end = 0
    for tensor in graph.initializer:
        assert tensor.data_location == onnx.TensorProto.EXTERNAL
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place["location"] == "model.data"
        assert int(place["offset"]) >= end
        end = int(place["offset"]) + int(place["length"])
    assert end == size
    # Without its constants the graph is small enough for an engine to read again and again.
    assert (tmp_path / "model.onnx").stat().st_size < size


def test_threshold_is_compared_with_the_bytes_of_the_constants(tmp_path: Path) -> None:
    graph = KVCacheGraph(random_model("llama").requires_grad_(False))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    write_onnx(graph, tmp_path / "one")
    constants = onnx.load(tmp_path / "one" / "model.onnx").graph.initializer
    size = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in constants)
    assert write_onnx(graph, tmp_path / "one", largest_single_file=size) == ["model.onnx"]
    assert write_onnx(graph, tmp_path / "two", largest_single_file=size - 1) == ["model.onnx", "model.data"]


def test_threshold_above_what_protobuf_holds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most"):
        write_onnx(KVCacheGraph(random_model("llama")), tmp_path, largest_single_file=LARGEST_SINGLE_FILE + 1)


def test_changed_weight_is_found(tmp_path: Path) -> None:
    model = pruned_model()
    write_onnx(KVCacheGraph(model), tmp_path)
    linears = find_decoder_stack(model).all_linears()
    model.model.layers[1].mlp.down_proj.weight[3, 4] += 1
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj"):
        count_weights(tmp_path / "model.onnx", linears)


def test_linear_outside_the_graph_is_found(tmp_path: Path) -> None:
    model = pruned_model()
    write_onnx(KVCacheGraph(model), tmp_path)
    linears = {"model.layers.0.mlp.never_used": torch.nn.Linear(4, 4)}
    with pytest.raises(UserError, match="not one constant matrix"):
        count_weights(tmp_path / "model.onnx", linears)


def test_graph_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    model = pruned_model()
    reference = reference_logits(model)
    write_onnx(KVCacheGraph(model), tmp_path)
    graph = onnx.load(tmp_path / "model.onnx")
    tensor = next(t for t in graph.graph.initializer if t.name == "model.layers.1.input_layernorm.weight")
    tensor.raw_data = (onnx.numpy_helper.to_array(tensor) * np.float32(1.1)).tobytes()
    onnx.save(graph, tmp_path / "model.onnx")
    with pytest.raises(UserError, match="does not compute what the model computes"):
        check_graph(tmp_path / "model.onnx", reference)


def test_model_that_cannot_be_traced_is_refused_without_noise(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    graph = KVCacheGraph(random_model("llama").requires_grad_(False))
    # histc has no ONNX form; the exporter's native code then prints the whole graph.
    graph.model.model.norm.forward = lambda x: x + torch.histc(x, bins=4).sum()
    with pytest.raises(UserError, match=r"LlamaForCausalLM cannot be traced .*histc"):
        write_onnx(graph, tmp_path)
    assert capfd.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []
