"""DeepSparse in integers: zeros stay zero, the graph computes what its float form does within rounding, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from sparsedeploy.artifacts.description import load_artifact
from sparsedeploy.errors import UserError
from sparsedeploy.models.structure import find_decoder_stack
from sparsedeploy.runtimes.engine import open_model
from sparsedeploy.targets import deepsparse
from sparsedeploy.targets.int8_graph import Range, quantize_range, quantize_weight
from sparsedeploy.targets.registry import export_checkpoint
from tests.targets.graphs import GraphRunner, open_graph, random_tokens, save_for_export

LINEARS = 14


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pruned checkpoint, and its export in float32 and in integers."""
    root = tmp_path_factory.mktemp("int8")
    model = save_for_export(root / "checkpoint", "llama")
    with torch.no_grad():
        for linear in find_decoder_stack(model).all_linears().values():
            linear.weight[linear.weight.abs() < linear.weight.abs().median()] = 0
    model.save_pretrained(root / "checkpoint")
    (root / "text.txt").write_text("".join(f"def f{n}(x): return x + {n * n}\n" for n in range(300)))
    options = {"int8": "true", "data": str(root / "text.txt"), "sequences": "4", "windows": "4"}
    export_checkpoint(root / "checkpoint", "deepsparse", root / "float")
    export_checkpoint(root / "checkpoint", "deepsparse", root / "int8", options)
    return {name: root / name for name in ("checkpoint", "float", "int8", "text.txt")}


def test_weights_round_to_the_nearest_level_and_zero_stays_zero() -> None:
    weight = np.array([[0.0, -1.0, 0.0], [0.5, 0.26, 0.0], [-1.27, 0.0, 0.0]], np.float32)
    integers, scale = quantize_weight(weight)
    assert integers.tolist() == [[0, -127, 0], [50, 33, 0], [-127, 0, 0]]
    assert np.abs(integers * scale - weight).max() <= scale.max() / 2
    assert scale[2] == 1


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 2.0), (-5.0, 0.0), (0.0, 0.0)])
def test_an_activation_of_zero_is_exact(low: float, high: float) -> None:
    scale, zero = quantize_range(Range(low, high))
    assert zero.dtype == np.uint8
    assert (float(zero) - int(zero)) * float(scale) == 0
    assert (0 - float(zero)) * float(scale) == pytest.approx(low, abs=float(scale))
    assert (255 - float(zero)) * float(scale) >= high - float(scale)


def test_graph_holds_integers_and_every_pruned_zero(folders: dict[str, Path]) -> None:
    artifact = load_artifact(folders["int8"], verify=True)
    dense = load_artifact(folders["float"])
    assert (artifact.dtype, artifact.sparsity.weights) == ("int8", dense.sparsity.weights)
    assert artifact.sparsity.zeros >= dense.sparsity.zeros > 0
    found = artifact.quantization
    assert found is not None
    assert (found.pruned, found.revived) == (dense.sparsity.zeros, 0)
    assert found.perplexity_before is not None
    assert found.perplexity_after == pytest.approx(found.perplexity_before, rel=0.05)

    float_graph, graph = (onnx.load(folders[name] / "model.onnx").graph for name in ("float", "int8"))
    before = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in float_graph.initializer}
    matrices = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and tensor.dims]
    assert len(matrices) == LINEARS
    for tensor in matrices:
        integers, weight = onnx.numpy_helper.to_array(tensor), before[tensor.name]
        assert not integers[weight == 0].any()
        assert np.count_nonzero(integers) > 0.9 * np.count_nonzero(weight)
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulInteger") == LINEARS
    # Queries, keys and values share an input, and so do the gate and the projection up.
    assert kinds.count("QuantizeLinear") == 8


def test_logits_follow_the_float_graph(folders: dict[str, Path]) -> None:
    tokens = random_tokens(1, 24)
    logits = {
        name: GraphRunner(open_graph(folders[name] / "model.onnx"), batch=1).step(tokens).numpy()
        for name in ("float", "int8")
    }
    error = np.sqrt(((logits["int8"] - logits["float"]) ** 2).mean() / (logits["float"] ** 2).mean())
    assert 0 < error < 0.1


def test_linears_to_keep(folders: dict[str, Path], tmp_path: Path) -> None:
    options = {"int8": True, "data": str(folders["text.txt"]), "windows": 0, "int8_keep": "down_proj, o_proj"}
    artifact = export_checkpoint(folders["checkpoint"], "deepsparse", tmp_path / "out", options)
    kinds = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    assert kinds.count("MatMulInteger") == LINEARS - 4
    assert artifact.quantization is not None
    assert artifact.quantization.perplexity_before is None


def test_weights_beside_the_graph(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepsparse, "LARGEST_SINGLE_FILE", 0)
    options = {"int8": True, "data": str(folders["text.txt"]), "sequences": 4, "windows": 0}
    export_checkpoint(folders["checkpoint"], "deepsparse", tmp_path / "out", options)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"model.onnx", "model.data"}
    tokens = random_tokens(1, 24)
    runs = [
        GraphRunner(open_graph(folder / "model.onnx"), batch=1).step(tokens).numpy()
        for folder in (tmp_path / "out", folders["int8"])
    ]
    assert np.array_equal(*runs)


def test_refusals(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"names no calibration text.*--target-option data=TEXT"):
        export_checkpoint(folders["checkpoint"], "deepsparse", tmp_path / "out", {"int8": True})
    options = {"int8": True, "data": str(folders["text.txt"]), "int8_keep": "proj"}
    with pytest.raises(UserError, match="int8_keep leaves no linear"):
        export_checkpoint(folders["checkpoint"], "deepsparse", tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.engine
@pytest.mark.usefixtures("deepsparse_runtime")
def test_the_engine_computes_it_whole(folders: dict[str, Path]) -> None:
    tokens = random_tokens(1, 24)
    expected = GraphRunner(open_graph(folders["int8"] / "model.onnx"), batch=1).step(tokens)[0].numpy()
    ids = tokens[0].tolist()
    with open_model(folders["int8"], prompt_length=20, new_tokens=4, cores=1) as model:
        assert model.facts["fraction_of_supported_ops"] == 1.0
        prefill, decode = model.logits(ids[:20], ids[20:])
    # A value at the edge between two levels may fall to either side.
    assert np.abs(np.concatenate([prefill, decode]) - expected).max() < 0.05 * np.abs(expected).max()
