"""What needs no llama.cpp: how a tokenizer's way to split text is called."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import load_script
from tests.small_models import byte_tokenizer


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_script("export/llamacpp/gguf_tool.py")


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{**BYTES, "use_regex": True}], "gpt-2"),
        ([DIGITS, {**BYTES, "use_regex": True}], "smollm"),
        ([{"type": "Split", "pattern": {"Regex": "LLAMA"}}, BYTES], "llama-bpe"),
        ([{"type": "Split", "pattern": {"Regex": "[a-z]"}}, BYTES], None),
        ([{**BYTES, "use_regex": True, "add_prefix_space": True}], None),
        ([{"type": "Whitespace"}], None),
    ],
)
def test_split_name(tool: ModuleType, tmp_path: Path, steps: list[dict[str, object]], name: str | None) -> None:
    text = json.dumps({"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}})
    expression = next(key for key, value in tool._SPLITS.items() if value == "llama-bpe")
    (tmp_path / "tokenizer.json").write_text(text.replace('"LLAMA"', json.dumps(expression)))
    assert tool.split_name(tmp_path / "tokenizer.json") == name


def test_split_name_of_a_saved_tokenizer(tool: ModuleType, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    assert tool.split_name(tmp_path / "tokenizer.json") == "gpt-2"
    assert tool.split_name(tmp_path / "none.json") is None


def test_bytes_that_a_token_reads(tool: ModuleType, tmp_path: Path) -> None:
    gguf, np = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    sparse = np.zeros((64, 64), np.float32)
    sparse[:, :16] = 1
    for head in (True, False):
        path = tmp_path / f"{head}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("token_embd.weight", np.ones((10, 64), np.float32))
        writer.add_tensor("blk.0.attn_norm.weight", np.ones(64, np.float32))
        writer.add_tensor("blk.0.attn_q.weight", sparse)
        writer.add_tensor("blk.0.attn_k.weight", np.ones((64, 64), np.float32))
        if head:
            writer.add_tensor("output.weight", np.ones((10, 64), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found = tool.zeros(tmp_path, str(path), str(path))
        # One of embedding and head, the norm, a bit for each weight and a quarter of the values, and a dense matrix.
        assert found["bytes_per_token"] == 4 * 640 + 4 * 64 + (512 + 4 * 1024) + 4 * 4096
        assert (found["weights"], found["zeros"]) == (8192, 3072)
