"""Input widths that DeepSparse's sparse kernels get wrong are padded: the same logits, in both instruction sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsedeploy.machine import this_machine
from sparsedeploy.models.structure import find_decoder_stack
from sparsedeploy.runtimes.engine import open_model
from sparsedeploy.targets.check import check_graph, reference_logits
from sparsedeploy.targets.deepsparse import WIDTH_UNIT
from sparsedeploy.targets.kv_graph import KVCacheGraph
from sparsedeploy.targets.onnx_file import count_weights, write_onnx
from sparsedeploy.targets.registry import export_checkpoint
from tests.small_models import byte_tokenizer, config_of
from tests.targets.graphs import random_tokens

TOLERANCE = 5e-5


def sparse_model(family: str, **sizes: int) -> torch.nn.Module:
    """A random model, 80 % of each row of its decoder's linears zero."""
    torch.manual_seed(0)
    spread = {"init_std": 0.15} if family == "opt" else {"initializer_range": 0.15}
    model = AutoModelForCausalLM.from_config(config_of(family, **sizes, **spread)).eval().requires_grad_(False)
    for linear in find_decoder_stack(model).all_linears().values():
        smallest = linear.weight.abs().argsort(dim=1)[:, : int(0.8 * linear.in_features)]
        linear.weight.scatter_(1, smallest, 0.0)
    return model


@pytest.mark.parametrize(
    ("family", "sizes", "repeats"),
    [
        *(("llama", {"intermediate_size": 96 + rest}, False) for rest in range(16)),
        ("opt", {"intermediate_size": 90}, False),  # a bias grows too
        ("gemma", {"intermediate_size": 90}, False),  # tanh
        ("llama", {"hidden_size": 40, "intermediate_size": 90}, True),
        ("opt", {"hidden_size": 40}, True),
    ],
)
def test_every_product_is_padded_and_computes_the_same(
    family: str, sizes: dict[str, int], repeats: bool, tmp_path: Path
) -> None:
    model = sparse_model(family, num_hidden_layers=1, **sizes)
    reference = reference_logits(model)
    write_onnx(KVCacheGraph(model), tmp_path, width_unit=WIDTH_UNIT)
    graph = onnx.load(tmp_path / "model.onnx").graph
    shapes = {tensor.name: tensor.dims for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in shapes]
    assert len(products) >= 7 - (family == "opt")
    for node in products:
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        assert shapes[node.input[1]][int(transposed)] % WIDTH_UNIT == 0
    # What comes from an MLP's other products needs no further node.
    assert any(name.endswith(".first") for node in graph.node for name in node.output) == repeats
    linears = find_decoder_stack(model).all_linears()
    assert count_weights(tmp_path / "model.onnx", linears).weights == sum(
        one.weight.numel() for one in linears.values()
    )
    check = check_graph(tmp_path / "model.onnx", reference)
    assert check is not None
    assert check.largest_difference < TOLERANCE


@pytest.mark.engine
@pytest.mark.usefixtures("deepsparse_runtime")
@pytest.mark.parametrize("instructions", ["avx2", "avx512"])
@pytest.mark.parametrize(
    ("family", "sizes", "int8"),
    [
        ("llama", {"hidden_size": 64, "intermediate_size": 300}, False),
        ("llama", {"hidden_size": 40, "intermediate_size": 300}, False),
        ("opt", {"hidden_size": 40, "intermediate_size": 297}, False),
        ("llama", {"hidden_size": 40, "intermediate_size": 300}, True),
    ],
)
def test_engine_computes_what_the_model_does(
    family: str, sizes: dict[str, int], int8: bool, instructions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without padding the logits are off by as much as they are large (measured, in both instruction sets)."""
    if instructions == "avx512" and "avx512f" not in this_machine().flags:
        pytest.skip("this processor has no AVX-512")
    monkeypatch.setenv("NM_ARCH", instructions)
    model = sparse_model(family, **sizes)
    model.save_pretrained(tmp_path / "checkpoint")
    byte_tokenizer().save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "text.txt").write_text("".join(f"def f{n}(x): return x + {n * n}\n" for n in range(300)))
    options = {"int8": "true", "data": str(tmp_path / "text.txt"), "sequences": "2", "windows": "0"}
    export_checkpoint(tmp_path / "checkpoint", "deepsparse", tmp_path / "out", options if int8 else None)
    ids = random_tokens(1, 90)[0].tolist()
    model.set_attn_implementation("eager")
    expected = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    with open_model(tmp_path / "out", prompt_length=80, new_tokens=10, cores=1, chunk=16) as loaded:
        assert loaded.facts["hardware"]["instruction_set"] == instructions
        assert loaded.facts["fraction_of_supported_ops"] == 1.0
        found = np.concatenate(loaded.logits(ids[:80], ids[80:]))
    allowed = 0.2 * np.abs(expected).max() if int8 else TOLERANCE
    assert np.abs(found - expected).max() < allowed
