"""The byte limit: the export counts its own tensors, and the benchmark divides."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsedeploy.artifacts.folder import describe_folder
from sparsedeploy.artifacts.traffic import bitmask_bytes
from sparsedeploy.errors import UserError
from sparsedeploy.speed.byte_limit import bytes_per_token, decode_limit
from sparsedeploy.targets.registry import export_checkpoint
from tests.formats.test_transformers import save_sparse_model
from tests.runtimes.artifacts import describe
from tests.small_models import byte_tokenizer, save_model


@pytest.mark.parametrize(
    ("bits", "sparsity", "limit"),
    [(16, 0.5, 1.78), (16, 0.6, 2.16), (16, 0.7, 2.76), (32, 0.5, 1.88), (32, 0.0, 1.0), (32, 0.01, 1.0), (32, 1, 32)],
)
def test_bitmask(bits: int, sparsity: float, limit: float) -> None:
    size = 10**6
    least = bitmask_bytes(size, round(size * (1 - sparsity)), bits // 8)
    assert size * bits / 8 / least == pytest.approx(limit, abs=0.005)


def test_limit_is_a_quotient() -> None:
    dense = dataclasses.replace(describe(), bytes_per_token=6000)
    pruned = dataclasses.replace(describe(), bytes_per_token=4125)
    assert decode_limit(pruned, dense) == pytest.approx(6000 / 4125)
    assert decode_limit(dense, dense) == 1.0
    with pytest.raises(UserError, match=r"does not say how many bytes a token reads. Export the checkpoint again"):
        bytes_per_token(dataclasses.replace(dense, bytes_per_token=None))


@pytest.mark.parametrize("tied", [False, True])
def test_plain_folder_counts_the_head_and_no_lookup(tmp_path: Path, tied: bool) -> None:
    folder = save_model(tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=tied)
    tensors = load_file(folder / "model.safetensors")
    embedding = 0 if tied else tensors["model.embed_tokens.weight"].nbytes
    assert describe_folder(folder).bytes_per_token == sum(tensor.nbytes for tensor in tensors.values()) - embedding


def test_packed_folder_counts_the_packed_tensors(tmp_path: Path) -> None:
    save_sparse_model(tmp_path / "dense", "llama", torch.float32)
    artifact = export_checkpoint(tmp_path / "dense", "vllm", tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    counted = sum(tensor.nbytes for name, tensor in tensors.items() if "embed_tokens" not in name)
    dense = describe_folder(tmp_path / "dense")
    assert artifact.bytes_per_token == counted < bytes_per_token(dense)


def test_graph_counts_bits_where_the_engine_packs_and_the_head_in_its_own_type(tmp_path: Path) -> None:
    save_sparse_model(tmp_path / "checkpoint", "llama", torch.float32)
    byte_tokenizer().save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "text.txt").write_text("".join(f"def f{n}(x): return x + {n * n}\n" for n in range(300)))
    options = {"int8": "true", "data": str(tmp_path / "text.txt"), "sequences": "2", "windows": "0"}
    floats = export_checkpoint(tmp_path / "checkpoint", "deepsparse", tmp_path / "float")
    integers = export_checkpoint(tmp_path / "checkpoint", "deepsparse", tmp_path / "int8", options)
    head = 4 * floats.shapes.vocab * floats.shapes.hidden
    weights, zeros = floats.sparsity.weights, floats.sparsity.zeros
    least = bitmask_bytes(weights, weights - zeros, 4)
    # Beside them stand norms, scales and padding; some matrices are dense, so the sum of each one's least is less.
    assert 0.9 * least + head < bytes_per_token(floats) < 1.1 * least + 1.1 * head
    assert bytes_per_token(integers) > head
    assert bytes_per_token(integers) - head < 0.5 * (bytes_per_token(floats) - head)
