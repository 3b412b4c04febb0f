"""The deepsparse target as a user meets it: what the folder holds, and one clear refusal for each bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, MptConfig, PretrainedConfig
from typer.testing import CliRunner

from sparsedeploy.artifacts.description import load_artifact
from sparsedeploy.cli.export import export_command
from sparsedeploy.errors import UserError
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.low_rank import LowRank, save_adapter
from sparsedeploy.targets.registry import export_checkpoint
from tests.small_models import byte_tokenizer, config_of, save_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama", initializer_range=0.15)


def edit_weight(folder: Path, name: str, change: object) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights[name] = change(weights[name])
    save_file(weights, file, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def run_command(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(export_command)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_command_writes_a_complete_artifact(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    printed = json.loads(run_command(str(checkpoint), "--target", "deepsparse", "-o", str(output), "--json"))
    artifact = load_artifact(output, verify=True)
    assert printed == {"output": str(output), **artifact.to_json()}
    # All that came with the model but its weights.
    expected = {path.name for path in checkpoint.iterdir()} - {"model.safetensors"} | {"model.onnx", "known_answer.npz"}
    assert {"config.json", "tokenizer.json"} < set(artifact.files) == expected
    assert {path.name for path in output.iterdir()} == {*expected, "artifact.json", "README.md"}
    assert (artifact.source.name, artifact.source.sha256) == ("tiny-llama", model_sha256(checkpoint))
    shapes = artifact.shapes
    assert (shapes.layers, shapes.kv_heads, shapes.head_dim, shapes.hidden) == (2, 2, 8, 32)
    assert (shapes.vocab, shapes.max_positions) == (259, 128)
    assert (artifact.engine.name, artifact.engine.version) == ("deepsparse", "1.8.0")
    assert (output / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
    assert artifact.sparsity.zeros == 0


def test_command_prints_sparsity_and_check(checkpoint: Path, tmp_path: Path) -> None:
    text = run_command(str(checkpoint), "-t", "deepsparse", "-o", str(tmp_path / "out"))
    assert "0.00% of" in text
    assert "logits differ by at most" in " ".join(text.split())


def test_pruned_bfloat16_checkpoint(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama", dtype=torch.bfloat16, initializer_range=0.15)
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weight(folder, name, lambda weight: weight * (weight.abs() > weight.abs().median()))
    artifact = export_checkpoint(folder, "deepsparse", tmp_path / "out")
    assert artifact.dtype == "float32"
    assert artifact.sparsity.zeros == int((load_file(folder / "model.safetensors")[name] == 0).sum()) > 0


def test_adapter_beside_the_weights_is_part_of_the_graph(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama", initializer_range=0.15)
    name = "model.layers.0.mlp.up_proj"
    plain = export_checkpoint(folder, "deepsparse", tmp_path / "plain")
    shape = load_file(folder / "model.safetensors")[f"{name}.weight"].shape
    save_adapter(folder / "adapter", {name: LowRank(torch.ones(2, shape[1]), torch.ones(shape[0], 2))}, "model")
    adapted = export_checkpoint(folder, "deepsparse", tmp_path / "out")
    assert adapted.check is not None
    assert adapted.check.largest_difference < 1e-4
    assert adapted.files["model.onnx"] != plain.files["model.onnx"]
    assert adapted.sparsity == plain.sparsity


def test_target_options(checkpoint: Path, tmp_path: Path) -> None:
    arguments = [str(checkpoint), "-t", "deepsparse", "--target-option", "max-positions=48"]
    run_command(*arguments, "-o", str(tmp_path / "out"))
    assert load_artifact(tmp_path / "out", verify=True).shapes.max_positions == 48
    with pytest.raises(UserError, match="deepsparse has no option 'speed'"):
        export_checkpoint(checkpoint, "deepsparse", tmp_path / "other", {"speed": "high"})


def test_existing_output_is_kept_unless_told(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="--overwrite"):
        export_checkpoint(checkpoint, "deepsparse", output)
    assert (output / "mine.txt").read_text() == "keep"
    with pytest.raises(UserError, match="files that sparsedeploy did not write"):
        export_checkpoint(checkpoint, "deepsparse", output, overwrite=True)
    (output / "artifact.json").write_text("{}")
    export_checkpoint(checkpoint, "deepsparse", output, overwrite=True)
    assert not (output / "mine.txt").exists()
    load_artifact(output)


def refused(folder: Path, tmp_path: Path, match: str) -> None:
    """The export is refused in one line and leaves nothing behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=match) as caught:
        export_checkpoint(folder, "deepsparse", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert caught.value.fix
    assert sorted(tmp_path.iterdir()) == before


def test_unknown_target(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown export target 'deepsparce'"):
        export_checkpoint(checkpoint, "deepsparce", tmp_path / "out")


def test_no_such_model(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path, "no model folder")


def test_encoder_decoder(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    refused(folder, tmp_path, "encoder-decoder")


def test_encoder_only(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    refused(folder, tmp_path, "is a model of type clip, for which transformers has no causal language model")


def test_missing_tokenizer(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refused(folder, tmp_path, "no tokenizer")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj", "model.norm", "lm_head"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, name: str, value: float) -> None:
    folder = save_model(tmp_path / "model")
    edit_weight(folder, f"{name}.weight", lambda weight: weight.index_fill(0, torch.tensor([3]), value))
    refused(folder, tmp_path, f"{name}.weight holds NaN or infinite")


def test_quantised_checkpoint(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    tensors = load_file(folder / "model.safetensors")
    weight = tensors.pop("model.layers.0.mlp.up_proj.weight")
    tensors["model.layers.0.mlp.up_proj.qweight"] = weight[::8].to(torch.int32).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, tmp_path, r"is quantised \(gptq: model\.layers\.0\.mlp\.up_proj\.qweight\)")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        # transformers 5 fuses the experts; before, an expert that no token of the trace chose was not in the graph.
        (
            MixtralConfig(**{**config_of("llama").to_dict(), "model_type": "mixtral"}, num_local_experts=4),
            "part of a fused or transposed weight",
        ),
        (
            GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=259, n_positions=64),
            "part of a fused or transposed weight",
        ),
        (MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=259), "does not use positions"),
    ],
    ids=["experts", "Conv1D", "no positions"],
)
def test_architectures_that_cannot_be_exported(tmp_path: Path, config: PretrainedConfig, reason: str) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    refused(tmp_path / "model", tmp_path, reason)
