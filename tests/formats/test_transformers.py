"""Packed checkpoints: written by the export, read and written again by transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsedeploy.artifacts.description import load_artifact
from sparsedeploy.errors import UserError
from sparsedeploy.formats import hf, kernel_library, quantized
from sparsedeploy.formats import packed as packing
from sparsedeploy.formats.config import PackedConfig
from sparsedeploy.models.structure import find_decoder_stack
from sparsedeploy.plan import NM
from sparsedeploy.pruning.selection import keep_all_but_smallest, keep_n_of_m
from sparsedeploy.targets.registry import export_checkpoint
from tests.small_models import byte_tokenizer, random_model

PROMPT = torch.arange(10, 22)[None]
PATTERNS: list[NM | None] = [None, NM(2, 4), NM(2, 8), NM(4, 8)]


def save_sparse_model(
    folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, shard: str = "5GB", **changes: int
) -> Path:
    """Every linear sparse, in each of the patterns by turns."""
    model = random_model(family, **{"intermediate_size": 64, **changes}).to(dtype)
    for index, linear in enumerate(find_decoder_stack(model).all_linears().values()):
        pattern = PATTERNS[index % len(PATTERNS)]
        scores = linear.weight.detach().float().abs()
        if pattern is None:
            mask = keep_all_but_smallest(scores, int(0.6 * scores.shape[1]))
        else:
            mask = keep_n_of_m(scores, pattern.n, pattern.m)
        linear.weight.data[~mask] = 0
    model.save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _unpacked_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply unpacked weights even where the kernels are importable: equal to the dense model in every bit."""
    monkeypatch.setattr(kernel_library, "load", lambda: None)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("packed")
    dense = save_sparse_model(folder / "dense", "llama")
    export_checkpoint(dense, "vllm", folder / "packed")
    return dense, folder / "packed"


def logits(folder: Path, **options: object) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        return model(PROMPT).logits


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2", "gemma2"])
def test_same_logits_as_the_dense_checkpoint(tmp_path: Path, family: str) -> None:
    dense = save_sparse_model(tmp_path / "dense", family)
    export_checkpoint(dense, "vllm", tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert sum(isinstance(module, hf.PackedLinear) for module in model.modules()) == len(
        PackedConfig.from_dict(json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]).modules
    )
    assert torch.equal(logits(tmp_path / "packed"), logits(dense))


def test_other_dtype_on_load(exported: tuple[Path, Path]) -> None:
    dense, packed = exported
    assert torch.equal(logits(packed, dtype=torch.float32), logits(dense, dtype=torch.float32))


def test_formats_follow_the_weights(exported: tuple[Path, Path]) -> None:
    config = PackedConfig.from_dict(json.loads((exported[1] / "config.json").read_text())["quantization_config"])
    assert {entry.kind for entry in config.modules.values()} == {"bitmask", "2:4", "2:8", "4:8"}
    assert config.ignore == ("lm_head",)


def test_artifact(exported: tuple[Path, Path]) -> None:
    artifact = load_artifact(exported[1], verify=True)
    assert (artifact.target, artifact.engine.name, artifact.dtype) == ("vllm", "vllm", "bfloat16")
    assert artifact.sparsity.fraction == pytest.approx(0.6, abs=0.03)


def test_only_bitmask_on_request(exported: tuple[Path, Path], tmp_path: Path) -> None:
    export_checkpoint(exported[0], "vllm", tmp_path / "packed", {"format": "bitmask"})
    values = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    assert {entry["format"] for entry in values["modules"].values()} == {"bitmask"}
    assert torch.equal(logits(tmp_path / "packed"), logits(exported[0]))


def test_save_pretrained_round_trip(exported: tuple[Path, Path], tmp_path: Path) -> None:
    _, packed = exported
    AutoModelForCausalLM.from_pretrained(packed).save_pretrained(tmp_path / "again")
    first, again = load_file(packed / "model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) and first[name].dtype == again[name].dtype for name in first)
    assert torch.equal(logits(tmp_path / "again"), logits(packed))


def test_dequantize(exported: tuple[Path, Path], tmp_path: Path) -> None:
    dense, packed = exported
    model = AutoModelForCausalLM.from_pretrained(packed).dequantize()
    model.save_pretrained(tmp_path / "dense")
    expected, found = load_file(dense / "model.safetensors"), load_file(tmp_path / "dense/model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_kernels_compute_what_the_dense_model_does(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is copied, saved after it has run, loaded anew, or that keeps only what the kernels read."""
    monkeypatch.undo()
    if kernel_library.load() is None:
        pytest.skip("no C++ compiler: install g++")
    dense = logits(exported[0], dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(exported[1], dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(model(PROMPT).logits, dense, atol=1e-5)
        model.save_pretrained(tmp_path / "again")
        assert torch.allclose(logits(tmp_path / "again", dtype=torch.float32), dense, atol=1e-5)
        copy = deepcopy(model)
        first = next(module for module in model.modules() if isinstance(module, hf.PackedLinear))
        state = {name: torch.zeros_like(t) if "values" in name else t for name, t in first.state_dict().items()}
        first.load_state_dict(state)
        assert not torch.allclose(model(PROMPT).logits, dense, atol=5e-5)
        for module in copy.modules():
            if isinstance(module, hf.PackedLinear):
                module.prepare(keep=False)
                assert all(buffer.numel() == 0 for buffer in module.buffers())
        del model
        assert torch.allclose(copy(PROMPT).logits, dense, atol=1e-5)


def test_shards_get_an_index(tmp_path: Path) -> None:
    dense = save_sparse_model(tmp_path / "dense", "llama", shard="30KB")
    assert len(list(dense.glob("*.safetensors"))) > 1
    export_checkpoint(dense, "vllm", tmp_path / "packed")
    index = json.loads((tmp_path / "packed/model.safetensors.index.json").read_text())
    stored = {name for shard in (tmp_path / "packed").glob("*.safetensors") for name in load_file(shard)}
    assert set(index["weight_map"]) == stored
    assert torch.equal(logits(tmp_path / "packed"), logits(dense))


def copy_with(packed: Path, target: Path, tensor: str, change: object) -> Path:
    """A copy of a packed folder with one tensor changed in place."""
    target.mkdir()
    for path in packed.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(target / "model.safetensors")
    name = next(name for name in tensors if name.endswith(tensor))
    change(tensors[name])  # type: ignore[operator]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_damaged_tensors_are_refused(exported: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy_with(exported[1], tmp_path / "offsets", "weight_offsets", lambda tensor: tensor[2:4].add_(1))
    with pytest.raises(UserError, match="weight_offsets has"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_another_format_version_is_refused(exported: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy_with(exported[1], tmp_path / "version", "weight_offsets", lambda tensor: None)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="format version 99"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_export_refuses(exported: tuple[Path, Path], tmp_path: Path) -> None:
    model = random_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="smaller packed than dense"):
        export_checkpoint(tmp_path / "dense", "vllm", tmp_path / "out")
    with pytest.raises(UserError, match="quantised or packed"):
        export_checkpoint(exported[1], "vllm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_import_stays_light_and_registers_later() -> None:
    """``import sparsedeploy`` imports neither torch nor transformers; the method is there once transformers is."""
    program = """
import sys, sparsedeploy
assert not {"torch", "transformers", "numpy"} & set(sys.modules), sorted(sys.modules)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "sparsedeploy" in AUTO_QUANTIZER_MAPPING
"""
    other_order = (
        "import transformers.quantizers.auto as auto, sparsedeploy; auto.AUTO_QUANTIZER_MAPPING['sparsedeploy']"
    )
    for code in (program, other_order):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_give_the_dense_model(tmp_path: Path, dtype: torch.dtype) -> None:
    """Linears of int8 and int4 codes by turns; the dense model has the values that they stand for."""
    model = random_model("llama", intermediate_size=64).float()
    tensors, modules = {}, {}
    linears = find_decoder_stack(model).all_linears()
    for index, (name, linear) in enumerate(linears.items()):
        code_bits = (8, 4)[index % 2]
        rows, columns = linear.weight.shape
        scales = torch.full((rows, -(-columns // 32)), 0.002 if code_bits == 8 else 0.03).half()
        steps = linear.weight.detach() / float(scales[0, 0])
        codes = steps.round().clamp(-(2 ** (code_bits - 1)), 2 ** (code_bits - 1) - 1).to(torch.int8)
        packed = quantized.pack(codes, scales, code_bits, 32)
        linear.weight.data = quantized.unpack(packed)
        tensors.update({f"{name}.{part}": tensor for part, tensor in packed.tensors().items()})
        modules[name] = packing.describe(packed)
    model.save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "packed")
    stored = load_file(tmp_path / "packed/model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if name.removesuffix(".weight") not in modules}
    save_file({**kept, **tensors}, tmp_path / "packed/model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "packed/config.json").read_text())
    config["quantization_config"] = PackedConfig(modules, ("lm_head",)).to_dict()
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    assert torch.equal(logits(tmp_path / "packed", dtype=dtype), logits(tmp_path / "dense", dtype=dtype))
