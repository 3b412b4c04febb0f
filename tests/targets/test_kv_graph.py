"""The exported graph computes what transformers computes, for every family, with and without cache and padding."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import onnx
import onnxruntime
import pytest
import torch
from transformers import PreTrainedModel

from sparsedeploy.artifacts.description import Artifact
from sparsedeploy.errors import UserError
from sparsedeploy.models.structure import find_decoder_stack
from sparsedeploy.targets.kv_graph import KVCacheGraph
from sparsedeploy.targets.registry import export_checkpoint
from tests.small_models import random_model
from tests.targets.graphs import FAMILIES, SLIDING, GraphRunner, open_graph, random_tokens, save_for_export

# Logits reach about 5; two runtimes that add float32 products in different orders differ by some 1e-6. A position or a
# mask column that is off, a window one longer, a lost soft cap or a scale 5 % off move them by 5e-3 to 2.
TOLERANCE = 1e-4
PROMPT, STEPS = 21, 8  # longer than the window of 16 of the sliding families, and odd


class Exported(NamedTuple):
    family: str
    model: PreTrainedModel
    folder: Path
    artifact: Artifact
    session: onnxruntime.InferenceSession


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_for_export(folder / "model", request.param)
    artifact = export_checkpoint(folder / "model", "deepsparse", folder / "out")
    return Exported(request.param, model, folder / "out", artifact, open_graph(folder / "out" / "model.onnx"))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_prompt_and_decoding_equal_one_full_pass(exported: Exported, batch: int) -> None:
    tokens = random_tokens(batch, PROMPT + STEPS)
    expected = exported.model(input_ids=tokens, use_cache=False).logits
    runner = GraphRunner(exported.session, batch)
    assert difference(runner.step(tokens[:, :PROMPT]), expected[:, :PROMPT]) < TOLERANCE
    for at in range(PROMPT, PROMPT + STEPS):
        assert difference(runner.step(tokens[:, at : at + 1]), expected[:, at : at + 1]) < TOLERANCE


@torch.no_grad()
def test_chunks_into_a_cache_of_fixed_size(exported: Exported) -> None:
    tokens = random_tokens(1, 24)
    expected = exported.model(input_ids=tokens, use_cache=False).logits
    runner = GraphRunner(exported.session, 1, empty_columns=9)
    found = torch.cat([runner.step(tokens[:, at : at + 6]) for at in range(0, 24, 6)], dim=1)
    assert difference(found, expected) < TOLERANCE


@torch.no_grad()
def test_left_padding_has_no_effect(exported: Exported) -> None:
    tokens = random_tokens(2, PROMPT + 1)
    mask = torch.ones(2, PROMPT, dtype=torch.int64)
    mask[1, :5] = 0
    runner = GraphRunner(exported.session, 2)
    prompt = runner.step(tokens[:, :PROMPT], mask)
    last = runner.step(tokens[:, PROMPT:])
    found = torch.cat([prompt, last], dim=1)
    assert difference(found[0], exported.model(input_ids=tokens[:1], use_cache=False).logits[0]) < TOLERANCE
    alone = exported.model(input_ids=tokens[1:, 5:], use_cache=False).logits[0]
    assert difference(found[1, 5:], alone) < TOLERANCE


@torch.no_grad()
def test_right_padding_has_no_effect(exported: Exported) -> None:
    tokens = random_tokens(2, PROMPT + 1)
    mask = torch.ones(2, PROMPT, dtype=torch.int64)
    mask[1, -4:] = 0
    runner = GraphRunner(exported.session, 2)
    prompt = runner.step(tokens[:, :PROMPT], mask)
    last = runner.step(tokens[:, PROMPT:])
    kept = torch.cat([tokens[1, : PROMPT - 4], tokens[1, PROMPT:]])[None]
    alone = exported.model(input_ids=kept, use_cache=False).logits[0]
    assert difference(prompt[1, : PROMPT - 4], alone[:-1]) < TOLERANCE
    if exported.family not in SLIDING:  # a window counts columns, so padding between tokens shortens it
        assert difference(last[1], alone[-1:]) < TOLERANCE


def test_interface_is_the_one_deepsparse_reads(exported: Exported) -> None:
    graph = onnx.load(exported.folder / "model.onnx")
    shapes = exported.artifact.shapes
    pairs = [f"{i}.{part}" for i in range(shapes.layers) for part in ("key", "value")]
    head = ["input_ids", "attention_mask", "positions", "causal_mask"]
    assert [entry.name for entry in graph.graph.input] == [*head, *(f"past_key_values.{pair}" for pair in pairs)]
    assert [entry.name for entry in graph.graph.output] == ["logits", *(f"present.{pair}" for pair in pairs)]
    types = {entry.name: entry.type.tensor_type.elem_type for entry in graph.graph.input}
    assert {types[name] for name in head} == {onnx.TensorProto.INT64}
    cached = graph.graph.input[4].type.tensor_type.shape.dim
    assert (cached[1].dim_value, cached[3].dim_value) == (shapes.kv_heads, shapes.head_dim)
    assert [entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")] == [14]
    assert graph.ir_version <= 9  # the newest that onnx 1.14 reads, which DeepSparse pins


def test_every_linear_is_a_constant_matrix(exported: Exported) -> None:
    graph = onnx.load(exported.folder / "model.onnx").graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    factors = [node.input[1] for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    for name, linear in find_decoder_stack(exported.model).all_linears().items():
        (found,) = {f"{name}.weight", f"{name}.weight.T"} & set(factors)
        matrix = torch.from_numpy(onnx.numpy_helper.to_array(constants[found]).copy())
        matrix = matrix.T if found.endswith(".T") else matrix
        rows, columns = linear.weight.shape
        assert torch.equal(matrix[:rows, :columns], linear.weight)
        # Widths are padded with zeros for the engine's kernels.
        assert matrix.count_nonzero() == linear.weight.count_nonzero()


@torch.no_grad()
def test_tracing_leaves_the_model_as_it_was() -> None:
    model = random_model("gemma2").requires_grad_(False)
    tokens = random_tokens(1, 7)
    before = model(input_ids=tokens).logits
    graph = KVCacheGraph(model)
    graph(*graph.example_inputs())
    assert torch.equal(model(input_ids=tokens).logits, before)


@torch.no_grad()
def test_mask_input_decides_and_not_the_position_of_a_column() -> None:
    graph = KVCacheGraph(random_model("llama", initializer_range=0.15).requires_grad_(False))
    inputs = list(graph.example_inputs(batch=1, length=3, past=4))
    attended = graph(*inputs)[0]
    inputs[3] = inputs[3].clone()
    inputs[3][..., 2] = 0
    by_causal_mask = graph(*inputs)[0]
    inputs = list(graph.example_inputs(batch=1, length=3, past=4))
    inputs[1] = inputs[1].clone()
    inputs[1][:, 2] = 0
    assert torch.equal(graph(*inputs)[0], by_causal_mask)
    assert difference(by_causal_mask, attended) > 1e-2


def test_rotary_scaling_that_depends_on_the_length_is_refused() -> None:
    model = random_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(UserError, match="dynamic"):
        KVCacheGraph(model)


def test_other_layer_types_are_refused() -> None:
    model = random_model("qwen3")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(UserError, match="chunked_attention"):
        KVCacheGraph(model)
