"""Bad input: one clear line that names the fix, exit code 2, and nothing half-written."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Outcome, defaults
from tests.runtimes.artifacts import refresh
from tests.small_models import save_model

Cli = Callable[..., Outcome]


def refused(outcome: Outcome, message: str, folder: Path) -> None:
    """The error is one line with the message and a fix, and everything in the test's folder is as it was."""
    assert outcome.code == 2, outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, outcome.err
    assert message in lines[0]
    assert lines[0].count(". ") >= 1, "the line names no fix"
    assert "Traceback" not in outcome.err
    assert folder.is_relative_to(outcome.place)
    assert outcome.changed == []


def prune(cli: Cli, model: Path, text: Path, *more: object) -> Outcome:
    base = defaults(more, data=text, samples=2, calibration_length=32, device="cpu")
    return cli("prune", model, "-o", model.parent / "out", *base, *more)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-s", "1.0"], "sparsity 1.0 is outside [0, 1)"),
        (["-s", "-0.1"], "sparsity -0.1 is outside [0, 1)"),
        (["-s", "nan"], "--sparsity is 'nan'. It takes a finite number"),
        ([], "no sparsity given"),
        (["-s", "0.995"], "cannot be met with rates between 0 and 0.99"),
        (["-p", "5:4"], "pattern 5:4 keeps more than it has"),
        (["-p", "0:4"], "pattern 0:4 keeps nothing"),
        (["-p", "two"], "pattern 'two' is not known"),
        (["-p", "3:6"], "not divisible by the 6 of 3:6"),
        (["-p", "2:4", "-s", "0.7"], "pattern 2:4 keeps 2 of 4: 0.5 sparsity, not 0.7"),
        (["-p", "2:4", "-a", "owl"], "gives unequal rates, which the fixed pattern 2:4 cannot hold"),
        (["-s", "0.5", "-m", "nosuch"], "unknown pruning method 'nosuch'. Known: alps, magnitude"),
        (["-s", "0.5", "-a", "nosuch"], "unknown allocation method 'nosuch'. Known: "),
        (["-s", "0.5", "-m", "sparsegpt", "--method-option", "blok=8"], "sparsegpt has no option 'blok'"),
        (
            ["-s", "0.5", "-m", "sparsegpt", "--method-option", "block=x"],
            "option block is 'x'. It takes a whole number",
        ),
        (["-s", "0.5", "--method-option", "block"], "option 'block' is not NAME=VALUE"),
        (["-s", "0.5", "--device", "tpu9"], "unknown device 'tpu9'"),
        (["-s", "0.5", "--dtype", "int8"], "--dtype is 'int8'. It takes auto, float32, bfloat16 or float16"),
        (["-s", "0.5", "--data", "nowhere.txt"], "no text at 'nowhere.txt'"),
        (["-s", "0.5", "--calibration-length", "200"], "calibration length 200 exceeds the model's 128 positions"),
        (["-s", "0.5", "-n", "0"], "--samples is '0'. It takes a whole number of at least 1"),
        (["-s", "0.5", "--plan", "nowhere.json"], "no plan at nowhere.json"),
    ],
)
def test_options(cli: Cli, model: Path, text: Path, options: list[str], message: str) -> None:
    refused(prune(cli, model, text, *options), message, model.parent)


def test_empty_and_short_text(cli: Cli, model: Path, text: Path) -> None:
    text.write_text(" \n ")
    refused(prune(cli, model, text, "-s", 0.5), "holds no text", model.parent)
    text.write_text("short")
    refused(prune(cli, model, text, "-s", 0.5), "gives 5 tokens, fewer than one sequence of 32", model.parent)


def test_unknown_model_type(cli: Cli, model: Path, text: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "frobnicator"}))
    refused(prune(cli, model, text, "-s", 0.5), "model type 'frobnicator'", model.parent)


def test_missing_tokenizer(cli: Cli, model: Path, text: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    refused(prune(cli, model, text, "-s", 0.5), "has no tokenizer", model.parent)


def test_missing_model(cli: Cli, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(prune(cli, model.parent / "nowhere", text, "-s", 0.5), "no model folder at", model.parent)
    shutil.rmtree(model)
    model.mkdir()
    refused(prune(cli, model, text, "-s", 0.5), "has no config.json", model.parent)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_non_finite_weights(cli: Cli, model: Path, text: Path, value: float, method: str) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    message = "model.layers.1.mlp.up_proj.weight holds NaN or infinite values"
    data = () if method == "magnitude" else ("--data", text, "-n", 2, "--calibration-length", 32)
    outcome = cli("prune", model, "-o", model.parent / "out", "-s", 0.5, "-m", method, *data)
    refused(outcome, message, model.parent)


def test_truncated_and_missing_weights(cli: Cli, model: Path, text: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(prune(cli, model, text, "-s", 0.5), "truncated or corrupt", model.parent)
    weights.unlink()
    refused(prune(cli, model, text, "-s", 0.5), "holds no .safetensors weights", model.parent)


def test_existing_output_is_kept(cli: Cli, model: Path, text: Path) -> None:
    output = model.parent / "out"
    output.mkdir()
    (output / "precious").write_text("x")
    outcome = prune(cli, model, text, "-s", 0.5)
    assert outcome.code == 2
    assert "exists. Choose another, or pass --overwrite" in outcome.err
    message = "holds files that sparsedeploy did not write"
    refused(prune(cli, model, text, "-s", 0.5, "--overwrite"), message, model.parent)
    assert (output / "precious").read_text() == "x"
    (output / "sparsity.json").write_text("{}")
    assert prune(cli, model, text, "-s", 0.5, "--overwrite").code == 0
    assert not (output / "precious").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 64 kB; skipped where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_the_work(cli: Cli, model: Path, small_disk: Path) -> None:
    outcome = cli("prune", model, "-o", small_disk / "out", "-s", 0.5, "-m", "magnitude")
    refused(outcome, "the disk is too full", small_disk)
    assert not list(small_disk.iterdir())


def test_a_disk_that_fills_up_keeps_what_is_finished(cli: Cli, model: Path, small_disk: Path) -> None:
    def resize(kilobytes: int) -> None:
        command = ["mount", "-o", f"remount,size={kilobytes}k", str(small_disk)]
        subprocess.run(command, capture_output=True, check=True)

    resize((model / "model.safetensors").stat().st_size // 1024 + 32)
    arguments = ("prune", model, "-o", small_disk / "out", "-s", 0.5, "-m", "magnitude")
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert (
        "is full. Fix that, then run the command again with --resume: the plan and 2 finished layers are kept."
        in outcome.err
    )
    assert not (small_disk / "out").exists()
    resize(1024)
    assert cli(*arguments, "--resume").code == 0
    assert [path.name for path in small_disk.iterdir()] == ["out"]
    assert cli("inspect", small_disk / "out").code == 0


def test_a_plan_for_another_model(cli: Cli, model: Path, text: Path) -> None:
    assert prune(cli, model, text, "-s", 0.5).code == 0
    manifest = json.loads((model.parent / "out" / "sparsity.json").read_text())
    shutil.rmtree(model.parent / "out")
    plan = model.parent / "plan.json"
    plan.write_text(json.dumps(manifest["plan"]))
    other = save_model(model.parent / "other", seed=1)
    refused(prune(cli, other, text, "--plan", plan), "the plan was made for another model", model.parent)
    manifest["plan"]["model_sha256"] = None
    manifest["plan"]["modules"].pop()
    plan.write_text(json.dumps(manifest["plan"]))
    refused(prune(cli, model, text, "--plan", plan), "the plan lacks 1 modules", model.parent)
    plan.write_text("{}")
    refused(prune(cli, model, text, "--plan", plan), "the plan lacks 'format'", model.parent)


def test_eval(cli: Cli, model: Path, text: Path) -> None:
    refused(cli("eval", model, "-d", text, "--context", 500), "context 500 is outside [2, 128]", model.parent)
    refused(cli("eval", model, "-d", "nowhere"), "no text at 'nowhere'", model.parent)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][:] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused(cli("eval", model, "-d", text), "lm_head.weight holds NaN or infinite values", model.parent)


def test_inspect(cli: Cli, model: Path) -> None:
    refused(cli("inspect", model), "has no sparsity.json", model.parent)


def test_unknown_command_and_option(cli: Cli) -> None:
    for arguments in (["nosuch"], ["prune", "--nosuch"], ["prune"]):
        outcome = cli(*arguments)
        assert outcome.code == 2
        assert "Traceback" not in outcome.err


def test_debug_shows_the_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsedeploy.cli.main import main
    from sparsedeploy.errors import UserError

    monkeypatch.setattr("sys.argv", ["sparsedeploy", "inspect", "/nowhere", "--debug"])
    with pytest.raises(UserError):
        main()


def test_a_recipe_or_plan_inside_the_output_is_kept(cli: Cli, model: Path) -> None:
    """They are inputs like the model and the text: --overwrite would delete them."""
    output = model.parent / "out"
    output.mkdir()
    (output / "sparsity.json").write_text("{}")
    (output / "recipe.yaml").write_text("prune: {sparsity: 0.5, method: magnitude}")
    assert cli("allocate", model, "-s", 0.5, "-a", "uniform", "-o", output / "plan.json").code == 0
    for options in (("--recipe", output / "recipe.yaml"), ("--plan", output / "plan.json", "-m", "magnitude")):
        refused(cli("prune", model, "-o", output, *options, "--overwrite"), "holds the input", model.parent)
    assert {"recipe.yaml", "plan.json"} < {path.name for path in output.iterdir()}


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "compressed-tensors", "torchao", "sparsedeploy", "x"])
def test_a_quantization_that_is_left_over(cli: Cli, model: Path, text: Path, method: str) -> None:
    """Every command takes plain weights for what they are, and the result does not say otherwise."""
    before = json.loads((model / "config.json").read_text())
    options = ("--context", 32, "--max-windows", 1, "--device", "cpu", "--json")
    expected = json.loads(cli("eval", model, "-d", text, *options).out)["perplexity"]
    quantization = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (model / "config.json").write_text(json.dumps({**before, "quantization_config": quantization}))
    outcome = cli("eval", model, "-d", text, *options)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["perplexity"] == expected
    assert f"says that the weights are quantised ({method}), and they are not" in outcome.err
    output = model.parent / "out"
    assert cli("prune", model, "-o", output, "-s", 0.5, "-m", "magnitude").code == 0
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    assert cli("inspect", output).code == 0


def test_weights_that_are_quantised_or_packed(cli: Cli, model: Path, text: Path) -> None:
    """One verdict of every command."""
    output, packed = model.parent / "out", model.parent / "packed"
    assert cli("prune", model, "-o", output, "-s", 0.6, "-m", "magnitude").code == 0
    assert cli("export", output, "-o", packed, "--target", "vllm").code == 0
    other = ("-o", model.parent / "x")
    refused(cli("prune", packed, *other, "-s", 0.5, "-m", "magnitude"), "packed for inference", packed)
    refused(cli("export", packed, *other, "--target", "deepsparse"), "quantised or packed", packed)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["format_version"] = 9
    (packed / "config.json").write_text(json.dumps(config))
    refused(cli("eval", packed, "-d", text, "--context", 32), "config.json was changed since the export", packed)
    refresh(packed)
    refused(
        cli("eval", packed, "-d", text, "--context", 32), "error: the checkpoint has packed format version 9", packed
    )
    config["quantization_config"]["quant_method"] = "compressed-tensors"
    (packed / "config.json").write_text(json.dumps(config))
    refresh(packed)
    for command in (
        ("eval", packed, "-d", text, "--context", 32),
        ("prune", packed, *other, "-s", 0.5, "-m", "magnitude"),
        ("export", packed, *other, "--target", "vllm"),
    ):
        refused(cli(*command), "is quantised (compressed-tensors: ", packed)
