"""GGUF files become ordinary folders, exactly; what cannot be imported is refused in one line and leaves nothing."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sparsedeploy.errors import UserError
from sparsedeploy.models.gguf_file import read_gguf
from sparsedeploy.models.loading import load_model
from sparsedeploy.reference.tokenizer import train_tokenizer
from sparsedeploy.workflows import import_model
from sparsedeploy.workflows.import_model import import_gguf
from sparsedeploy.workflows.options import ImportOptions, PruneOptions
from sparsedeploy.workflows.prune import prune
from tests.cli.mutations import OTHERS, unless_refused

gguf = pytest.importorskip("gguf")
TEXTS = ["def f(x):\n    return x + 1\n" * 20, "class A:\n    pass\n" * 20]
HEADS, KEY_VALUE_HEADS = 4, 2


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=280,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 280)


def rotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of query and key: pairs of a head side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The model's weights under GGUF's names."""
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    state = model.state_dict()
    found = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for index in range(model.config.num_hidden_layers):
        for theirs, ours in names.items():
            weight = state[f"model.layers.{index}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                weight = rotated(weight, HEADS if ours == "attn_q" else KEY_VALUE_HEADS)
            found[f"blk.{index}.{ours}.weight"] = weight
    return found


def write(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: Any,
    *,
    kind: str = "F32",
    architecture: str = "llama",
    change: Callable[[Any, dict[str, torch.Tensor]], None] = lambda writer, weights: None,
) -> Path:
    """A GGUF file of the model as llama.cpp's converter writes it, matrices in the given type."""
    writer, config = gguf.GGUFWriter(path, architecture), model.config
    writer.add_name("small")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].get))
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary["vocab"]) - 3))
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    weights = tensors(model)
    change(writer, weights)
    for name, weight in weights.items():
        of = gguf.GGMLQuantizationType["F32" if weight.ndim < 2 else kind]
        writer.add_tensor(name, gguf.quantize(weight.numpy(), of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantised(model: LlamaForCausalLM, kind: str) -> dict[str, torch.Tensor]:
    """The model's weights after a trip through a type, by our names."""
    of = gguf.GGMLQuantizationType[kind]

    def there_and_back(weight: torch.Tensor) -> torch.Tensor:
        if weight.ndim < 2:
            return weight
        return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), of), of)).reshape(weight.shape)

    return {name: there_and_back(weight) for name, weight in model.state_dict().items()}


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("Q8_0", "float32")])
def test_weights_and_tokenizer_come_out_exactly(
    model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, kind: str, dtype: str
) -> None:
    source = write(tmp_path / "model.gguf", model, tokenizer, kind=kind)
    record = import_gguf(source, tmp_path / "out")
    expected = dequantised(model, kind)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.dtype == getattr(torch, dtype)
        assert torch.equal(weight, expected[name].to(weight.dtype)), name
    assert (record["architecture"], record["dtype"]) == ("llama", dtype)
    assert record["types"][kind] >= 15
    assert record == json.loads((tmp_path / "out" / "import.json").read_text())
    text = "def f(x):\n    return x\n"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids[-5:] == tokenizer(text).input_ids[-5:]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["num_key_value_heads"], config["max_position_embeddings"]) == (KEY_VALUE_HEADS, 64)


def test_the_folder_is_like_any_other(model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "model.gguf", model, tokenizer)
    import_gguf(source, tmp_path / "out", ImportOptions(dtype="bfloat16"))
    tokens = torch.arange(16)[None]
    expected = model(tokens).logits
    assert torch.allclose(load_model(tmp_path / "out", dtype=torch.float32)(tokens).logits, expected, atol=2e-2)
    prune(str(tmp_path / "out"), tmp_path / "sparse", PruneOptions(sparsity=0.5, method="magnitude"))
    import_gguf(source, tmp_path / "out", overwrite=True)  # it is ours, so it may be replaced
    with pytest.raises(UserError, match="exists"):
        import_gguf(source, tmp_path / "out")


def refused(source: Path, tmp_path: Path, match: str) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=match):
        import_gguf(source, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_architecture_that_transformers_does_not_import(
    model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    source = write(tmp_path / "model.gguf", model, tokenizer, architecture="chameleon")
    refused(source, tmp_path, "cannot import a GGUF file of architecture 'chameleon'")


@pytest.mark.parametrize("kept", [3, 20, 200, 3_000, -1])
def test_truncated(model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, kept: int) -> None:
    source = write(tmp_path / "model.gguf", model, tokenizer)
    source.write_bytes(source.read_bytes()[:kept])
    refused(source, tmp_path, "not a GGUF file|is damaged|is truncated")


def test_damaged_headers(model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "model.gguf", model, tokenizer)
    whole = source.read_bytes()
    huge = struct.pack("<Q", 1 << 60)
    damaged = {
        "tensors": whole[:8] + huge + whole[16:],
        "values": whole[:16] + huge + whole[24:],
        "key": whole[:24] + huge + whole[32:],
        "version": whole[:4] + struct.pack("<I", 9) + whole[8:],
    }
    for content in damaged.values():
        source.write_bytes(content)
        refused(source, tmp_path, "is damaged|GGUF version 9")
    generator = np.random.default_rng(0)
    for at in generator.integers(4, 2_000, 60):
        noisy = bytearray(whole)
        noisy[at : at + 8] = generator.bytes(8)
        source.write_bytes(noisy)
        try:
            read_gguf(source)
        except UserError:
            continue


def test_noise_in_the_header(model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    """Whatever the bytes say, it is refused in one line, or what is imported can be loaded."""
    source = write(tmp_path / "model.gguf", model, tokenizer)
    whole = source.read_bytes()
    end = whole.index(b"blk.1.ffn_up.weight") + 60
    generator = np.random.default_rng(1 + OTHERS)
    for at in generator.integers(4, end, 40):
        noisy = bytearray(whole)
        noisy[at] = generator.integers(256)
        source.write_bytes(noisy)
        if unless_refused(lambda: import_gguf(source, tmp_path / "out", overwrite=True)) is not None:
            load_model(tmp_path / "out", dtype=torch.float32)


def test_tensors_that_share_bytes_or_lie_elsewhere(model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "model.gguf", model, tokenizer)
    whole = source.read_bytes()
    name = b"blk.0.attn_q.weight"
    at = whole.index(name) + len(name) + 4 + 2 * 8 + 4  # dimensions and type before it
    offset = struct.unpack("<Q", whole[at : at + 8])[0]
    for moved, match in (
        (0, "share bytes"),
        (offset + 32, "share bytes"),
        (offset + 1, "does not start at a multiple of 32"),
        (1 << 40, "is truncated"),
        (1 << 63, "is truncated"),
    ):
        source.write_bytes(whole[:at] + struct.pack("<Q", moved) + whole[at + 8 :])
        refused(source, tmp_path, match)
    other = b"blk.0.attn_v.weight"
    source.write_bytes(whole.replace(name, other, 1))
    refused(source, tmp_path, "two tensors of one name")


@pytest.mark.parametrize("value", ["many", [1], 2.5])
def test_a_count_of_parts_that_is_none(model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, value: Any) -> None:
    def add(writer: Any, _: Any) -> None:
        {str: writer.add_string, list: writer.add_array, float: writer.add_float32}[type(value)]("split.count", value)

    refused(write(tmp_path / "model.gguf", model, tokenizer, change=add), tmp_path, "split.count is not a number")


@pytest.mark.parametrize("alignment", [0, 3, 1 << 31])
def test_alignments_that_cannot_be(model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, alignment: int) -> None:
    source = write(
        tmp_path / "model.gguf",
        model,
        tokenizer,
        change=lambda writer, _: writer.add_uint32("general.alignment", alignment),
    )
    refused(source, tmp_path, f"an alignment of {alignment}")


@pytest.mark.parametrize(
    "key",
    ["block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length", "vocab_size"],
)
def test_sizes_that_cannot_be(model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, key: str) -> None:
    """Nothing of such a size is built, and what is accepted has the file's weights."""
    source = write(tmp_path / "model.gguf", model, tokenizer)
    whole = source.read_bytes()
    at = whole.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
    for number in (0, 3, 1 << 31, (1 << 32) - 1):
        source.write_bytes(whole[:at] + struct.pack("<I", number) + whole[at + 4 :])
        if unless_refused(lambda: import_gguf(source, tmp_path / "out")) is None:
            assert not (tmp_path / "out").exists()
            continue
        assert key in ("context_length", "vocab_size"), (key, number)
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
        shutil.rmtree(tmp_path / "out")
    source.write_bytes(whole[:at] + struct.pack("<I", 1 << 31) + whole[at + 4 :])
    if key == "block_count":
        refused(source, tmp_path, r"it says that it has 2,147,483,648 blocks, and has 2")


def test_unknown_quantisation(model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "model.gguf", model, tokenizer)
    content = source.read_bytes()
    name = b"blk.0.attn_q.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8  # number of dimensions, two dimensions, then the type
    for kind in (4, 200):
        source.write_bytes(content[:at] + struct.pack("<I", kind) + content[at + 4 :])
        refused(source, tmp_path, f"cannot read: type {kind}, of blk.0.attn_q.weight")


def test_weights_that_are_missing_or_would_be_lost(model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    write(source, model, tokenizer, change=lambda writer, weights: weights.pop("blk.1.ffn_up.weight"))
    refused(source, tmp_path, r"lacks the weight model\.layers\.1\.mlp\.up_proj\.weight")
    write(source, model, tokenizer, change=lambda writer, weights: weights.update({"more.weight": torch.ones(8, 32)}))
    refused(source, tmp_path, "would take .* of the .* weights")
    write(source, model, tokenizer, change=lambda _, weights: weights.update({"rope_freqs.weight": torch.ones(8)}))
    refused(source, tmp_path, "scales its positions by rope_freqs")

    def not_finite(_: Any, weights: dict[str, torch.Tensor]) -> None:
        weights["output_norm.weight"] = torch.full((64,), float("nan"))

    write(source, model, tokenizer, change=not_finite)
    refused(source, tmp_path, "not finite|NaN|finite")


def test_one_part_of_several(model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    source = write(
        tmp_path / "model.gguf", model, tokenizer, change=lambda writer, _: writer.add_uint16("split.count", 2)
    )
    refused(source, tmp_path, "one part of several")


def test_no_room_for_the_weights(
    model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "model.gguf", model, tokenizer)
    real = import_model.check_free_space
    # As on a disk with a thousandth of its room.
    monkeypatch.setattr(import_model, "check_free_space", lambda folder, needed: real(folder, needed << 40))
    refused(source, tmp_path, "the disk is too full")
