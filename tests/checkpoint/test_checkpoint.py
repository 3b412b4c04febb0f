"""A pruned folder is an ordinary Hugging Face folder that proves what it claims."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.checkpoint.inspection import inspect_checkpoint
from sparsedeploy.checkpoint.masks import FILE, load_masks
from sparsedeploy.errors import UserError
from sparsedeploy.workflows.options import PruneOptions, RunOptions
from sparsedeploy.workflows.prune import prune
from tests.small_models import FAMILIES, save_model

TEXT = "the quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def run(source: Path, output: Path, text: str, **options: object) -> dict:
    options = {"sparsity": 0.6, **options}
    calibration = CalibrationOptions(data=text, sequences=4, length=32, batch_size=2)
    return prune(str(source), output, PruneOptions(calibration=calibration, **options), RunOptions(device="cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reloads_with_its_zeros(family: str, tmp_path: Path, text: str) -> None:
    source = save_model(tmp_path / "dense", family, dtype=torch.bfloat16)
    manifest = run(source, tmp_path / "sparse", text, method="sparsegpt", allocation="owl")
    row_unit = max(target.rows for target in manifest.plan.targets)
    total = sum(target.size for target in manifest.plan.targets)
    assert abs(manifest.achieved - 0.6) * total < row_unit
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype="auto")
    masks = load_masks(tmp_path / "sparse" / FILE, {name: module.columns for name, module in manifest.modules.items()})
    for name, mask in masks.items():
        assert not model.get_submodule(name).weight[~mask].any()
    assert AutoTokenizer.from_pretrained(tmp_path / "sparse")("fox")["input_ids"]
    assert inspect_checkpoint(tmp_path / "sparse").problems == []


def test_tensors_outside_the_plan_are_untouched(tmp_path: Path, text: str) -> None:
    source = save_model(tmp_path / "dense", "qwen2", dtype=torch.float16, tie_word_embeddings=True)
    run(source, tmp_path / "sparse", text)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "sparse"))
    assert list(before) == list(after)
    for name in before:
        changed = "_proj.weight" in name
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name]) != changed


def test_no_sparsity_keeps_every_bit(tmp_path: Path, text: str) -> None:
    source = save_model(tmp_path / "dense", dtype=torch.bfloat16)
    run(source, tmp_path / "sparse", text, sparsity=0.0, method="sparsegpt")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "sparse"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_sharded_models_keep_their_shards(tmp_path: Path, text: str) -> None:
    source = save_model(tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, source / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "model.safetensors").unlink()
    run(source, tmp_path / "sparse", text)
    assert sorted(path.name for path in (tmp_path / "sparse").glob("*.safetensors")) == sorted(shards)
    assert inspect_checkpoint(tmp_path / "sparse").problems == []
    AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")


def test_two_runs_give_identical_bytes_on_any_batch_size(tmp_path: Path, text: str) -> None:
    source = save_model(tmp_path / "dense", "opt")
    contents = []
    for batch_size in (1, 4):
        output = tmp_path / f"sparse{batch_size}"
        calibration = CalibrationOptions(data=text, sequences=4, length=32, batch_size=batch_size)
        options = PruneOptions(sparsity=0.5, method="sparsegpt", allocation="owl", calibration=calibration)
        prune(str(source), output, options, RunOptions(device="cpu"))
        contents.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert contents[0] == contents[1]


def test_a_changed_weight_is_found(tmp_path: Path, text: str) -> None:
    source = save_model(tmp_path / "dense")
    run(source, tmp_path / "sparse", text)
    shard = tmp_path / "sparse" / "model.safetensors"
    tensors = load_file(shard)
    name = "model.layers.1.mlp.down_proj.weight"
    position = (tensors[name] == 0).nonzero()[0]
    tensors[name][tuple(position)] = 1.0
    save_file(tensors, shard, metadata={"format": "pt"})
    problems = inspect_checkpoint(tmp_path / "sparse").problems
    assert problems == [
        "file model.safetensors was changed after it was written",
        "model.layers.1.mlp.down_proj: weights that its mask prunes are not zero",
    ]


def test_a_dense_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no sparsity\.json"):
        inspect_checkpoint(save_model(tmp_path / "dense"))


def test_pattern_checkpoints_are_verified(tmp_path: Path, text: str) -> None:
    source = save_model(tmp_path / "dense")
    run(source, tmp_path / "sparse", text, sparsity=None, pattern="2:8")
    inspection = inspect_checkpoint(tmp_path / "sparse")
    assert inspection.sparsity == 0.75
    assert all(module.follows for module in inspection.modules)
    recipe = (tmp_path / "sparse" / "recipe.yaml").read_text()
    assert "mask_structure: '6:8'" in recipe or "mask_structure: 6:8" in recipe
