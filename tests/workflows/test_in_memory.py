"""Pruning a model in memory gives what the command gives, and what goes wrong says so."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparsedeploy
from sparsedeploy import CalibrationOptions, PruneOptions, UserError
from sparsedeploy.checkpoint.inspection import inspect_checkpoint
from sparsedeploy.workflows.options import RecoverOptions, RecoverRunOptions
from sparsedeploy.workflows.prune import prune as prune_folder
from sparsedeploy.workflows.recover import recover_checkpoint
from tests.small_models import byte_tokenizer, random_model, save_model


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return path


@pytest.mark.parametrize(
    "asked",
    [
        {"sparsity": 0.6, "method": "sparsegpt", "allocation": "owl"},
        {"pattern": "2:4", "method": "wanda"},
        {"sparsity": 0.5, "method": "magnitude"},
        {"pattern": "mixed-2:8", "method": "wanda", "reconstruct": True},
    ],
)
def test_the_same_weights_as_the_command(asked: dict, text: Path, tmp_path: Path) -> None:
    dense = save_model(tmp_path / "dense")
    options = PruneOptions(**asked, calibration=CalibrationOptions(data=str(text), sequences=4, length=32))
    prune_folder(str(dense), tmp_path / "command", options)
    model = AutoModelForCausalLM.from_pretrained(dense)
    assert model.training is False
    pruned = sparsedeploy.prune(model, options, byte_tokenizer())
    manifest = pruned.save(tmp_path / "saved")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("saved", "command"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert inspect_checkpoint(tmp_path / "saved").problems == []
    assert manifest.achieved == pytest.approx(pruned.sparsity)
    for name, mask in pruned.masks.items():
        weight = model.get_submodule(name).weight
        assert int((weight[~mask] != 0).sum()) == 0


def test_what_was_saved_is_recovered_with_the_dense_model(text: Path, tmp_path: Path) -> None:
    """Nobody has its hash, so it is the caller who says which it is."""
    dense = save_model(tmp_path / "dense")
    calibration = CalibrationOptions(data=str(text), sequences=2, length=32)
    model = AutoModelForCausalLM.from_pretrained(dense)
    sparsedeploy.prune(model, PruneOptions(0.5, "wanda", calibration=calibration), byte_tokenizer()).save(
        tmp_path / "p"
    )
    run = RecoverRunOptions(dense=str(dense))
    manifest = recover_checkpoint(tmp_path / "p", tmp_path / "out", RecoverOptions("sparselo", {"rank": 2}), run)
    assert manifest.recovery is not None
    assert inspect_checkpoint(tmp_path / "out").problems == []


def test_mode_and_gradients_stay_and_tokens_of_ones_own(tmp_path: Path) -> None:
    model = random_model("llama").train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    tokens = torch.randint(0, 250, (4, 16))
    pruned = sparsedeploy.prune(model, PruneOptions(0.5, "wanda"), tokens=tokens)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert pruned.calibration is not None
    assert pruned.calibration.data == "tokens"
    with pytest.raises(UserError, match="the model has no tokenizer"):
        pruned.save(tmp_path / "out")
    # Trained on: what the mask prunes is zero in the folder all the same.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    pruned = sparsedeploy.PrunedModel(**{**vars(pruned), "tokenizer": byte_tokenizer()})
    pruned.save(tmp_path / "out")
    assert inspect_checkpoint(tmp_path / "out").problems == []


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        (PruneOptions(0.5, "wanda"), {}, "wanda needs calibration text. Give a tokenizer, or tokens"),
        (PruneOptions(0.5, "wanda"), {"tokens": torch.zeros(4, dtype=torch.int64)}, "Give int64 tokens of shape"),
        (PruneOptions(0.5, "wanda"), {"tokens": torch.full((1, 4), 999)}, "999"),
        (PruneOptions(0.5, "magnitude"), {"tokens": torch.zeros(1, 4, dtype=torch.int64)}, "tokens have no effect"),
        (PruneOptions(None, "magnitude"), {}, "no sparsity given"),
        (PruneOptions(0.5, "nothing"), {}, "unknown pruning method 'nothing'"),
        (PruneOptions(0.5, "magnitude", allocation="auto"), {}, "allocation auto searches"),
        (PruneOptions(0.5, "magnitude", quantize="int8"), {}, "--quantize writes scales beside the weights"),
    ],
)
def test_refusals_leave_the_model_alone(options: PruneOptions, more: dict, message: str) -> None:
    model = random_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        sparsedeploy.prune(model, options, **more)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_package_loads_nothing_heavy_by_itself() -> None:
    program = "import sys, sparsedeploy; dir(sparsedeploy); print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert set(sparsedeploy.__all__) <= set(dir(sparsedeploy))
    assert all(getattr(sparsedeploy, name) is not None for name in sparsedeploy.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = sparsedeploy.nothing  # type: ignore[attr-defined]
