"""The onnxruntime target: Optimum's layout, the same logits as torch, counted zeros, and what it refuses."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from transformers import LlamaConfig, PreTrainedModel
from typer.testing import CliRunner

from sparsedeploy.artifacts.description import load_artifact
from sparsedeploy.cli.generate import generate_command
from sparsedeploy.errors import UserError
from sparsedeploy.models.structure import find_decoder_stack
from sparsedeploy.runtimes.engine import open_model
from sparsedeploy.runtimes.environments import Environment, check, require
from sparsedeploy.runtimes.installation import process_environment
from sparsedeploy.speed.benchmark import benchmark
from sparsedeploy.speed.options import BenchmarkOptions
from sparsedeploy.targets.onnxruntime import stage_for_transformers_4
from sparsedeploy.targets.registry import export_checkpoint
from tests.small_models import byte_tokenizer, save_model
from tests.targets.graphs import random_tokens, save_for_export

TOLERANCE = 5e-5
LOAD = """
import sys
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer
model = ORTModelForCausalLM.from_pretrained(sys.argv[1])
inputs = AutoTokenizer.from_pretrained(sys.argv[1])("def main(", return_tensors="pt")
print("TOKENS", model.generate(input_ids=inputs["input_ids"], max_new_tokens=8, do_sample=False)[0].tolist())
"""


@pytest.fixture(scope="module")
def runtime() -> Environment:
    try:
        return require("onnxruntime")
    except UserError as error:
        pytest.skip(f"{error} (1.2 GB)")


def save_sparse(folder: Path, family: str = "llama", theta: float = 500.0) -> PreTrainedModel:
    """A small model with half its linear weights zero, and a rotary base that is not the default."""
    model = save_for_export(folder, family)
    with torch.no_grad():
        for linear in find_decoder_stack(model).all_linears().values():
            linear.weight[linear.weight.abs() < linear.weight.abs().median()] = 0
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "rope_theta"):
        if isinstance(config.get(name), dict) and "rope_theta" in config[name]:
            config[name]["rope_theta"] = theta
        elif name in config and config[name] is not None:
            config[name] = theta
    (folder / "config.json").write_text(json.dumps(config))
    reloaded = type(model).from_pretrained(folder).eval()
    reloaded.set_attn_implementation("eager")
    return reloaded


@pytest.mark.optimum
@pytest.mark.slow
@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_same_logits_tokens_and_zeros(family: str, tmp_path: Path) -> None:
    model = save_sparse(tmp_path / "checkpoint", family)
    folder = tmp_path / "out"
    artifact = export_checkpoint(tmp_path / "checkpoint", "onnxruntime", folder)
    assert load_artifact(folder, verify=True) == artifact
    assert artifact.sparsity.fraction == pytest.approx(0.5, abs=0.01)
    assert artifact.check is not None
    assert artifact.check.largest_difference < TOLERANCE
    # Longer than Mistral's window of 16.
    ids = random_tokens(1, 40)[0].tolist()
    expected = model(torch.tensor([ids]), use_cache=False).logits[0].detach().numpy()
    with open_model(folder, prompt_length=30, new_tokens=10, cores=1, runtime="optimum") as loaded:
        prefill, decode = loaded.logits(ids[:30], ids[30:])
        timing = loaded.measure(ids[:30], 3)
        with pytest.raises(UserError, match="more than the 40 asked for"):
            loaded.measure(ids[:30], 11)
    assert np.abs(np.concatenate([prefill, decode]) - expected).max() < TOLERANCE
    assert len(timing.decode_seconds) == 3


@pytest.mark.optimum
@pytest.mark.slow
def test_folder_is_optimums(runtime: Environment, tmp_path: Path) -> None:
    """Optimum itself loads it and generates what ``sparsedeploy generate`` and transformers do."""
    model = save_sparse(tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", "onnxruntime", tmp_path / "out")
    done = subprocess.run(
        [str(runtime.python), "-c", LOAD, str(tmp_path / "out")],
        env=process_environment(runtime.runtime),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stderr[-2000:]
    prompt = byte_tokenizer()("def main(")["input_ids"]
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0].tolist()
    assert json.loads(lines[0].removeprefix("TOKENS ")) == expected

    app = typer.Typer()
    app.command()(generate_command)
    arguments = [str(tmp_path / "out"), "def main(", "--max-new-tokens", "8", "-c", "1", "--json"]
    printed = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)
    assert printed["prompt_tokens"] + printed["tokens"] == expected


@pytest.mark.optimum
@pytest.mark.slow
@pytest.mark.usefixtures("runtime")
def test_benchmark_runs_it(tmp_path: Path) -> None:
    for name in ("dense", "other"):
        save_model(tmp_path / name)
        export_checkpoint(tmp_path / name, "onnxruntime", tmp_path / f"{name}-out")
    result = benchmark(
        [tmp_path / "other-out"],
        BenchmarkOptions(
            baseline=str(tmp_path / "dense-out"),
            runtime="onnxruntime",
            cores=(1,),
            prompt_lengths=(8,),
            decode_tokens=2,
            rounds=1,
            warmup_rounds=0,
        ),
    )
    assert result.options.runtime == "onnxruntime"
    assert all(row.phase("decode").ms.median > 0 for row in result.rows)


@pytest.mark.optimum
@pytest.mark.slow
@pytest.mark.usefixtures("runtime")
def test_a_cache_that_optimum_misjudges_is_refused(tmp_path: Path) -> None:
    save_for_export(tmp_path / "checkpoint", "gemma2")
    with pytest.raises(UserError, match=r"assumes 4 key/value heads of size 8 for a model of type gemma2"):
        export_checkpoint(tmp_path / "checkpoint", "onnxruntime", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.optimum
@pytest.mark.usefixtures("runtime")
def test_engine_checks_itself() -> None:
    report = check("optimum")
    assert report.name == "onnxruntime"
    assert report.largest_difference < 1e-4
    assert report.versions["optimum-onnx"] == "0.1.0"


def test_not_installed_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "checkpoint")
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match=r"Run: sparsedeploy runtime install onnxruntime"):
        export_checkpoint(tmp_path / "checkpoint", "onnxruntime", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def stage(folder: Path, config: dict[str, object], tokenizer: dict[str, object] | None = None) -> Path:
    """Write settings as transformers 5 does, and stage them."""
    (folder / "new").mkdir()
    (folder / "old").mkdir()
    (folder / "new" / "config.json").write_text(json.dumps(config))
    (folder / "new" / "model.safetensors").write_bytes(b"weights")
    if tokenizer is not None:
        (folder / "new" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return stage_for_transformers_4(folder / "new", folder / "old")


def test_rotary_settings_get_their_older_names(tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0}
    folder = stage(
        tmp_path,
        {"model_type": "llama", "rope_parameters": scaled},
        {"tokenizer_class": "TokenizersBackend", "eos_token": "</s>"},
    )
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 777.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert LlamaConfig(**config).to_dict()["model_type"] == "llama"
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_rotary_settings_for_each_kind_of_layer(tmp_path: Path) -> None:
    kinds = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    folder = stage(tmp_path, {"model_type": "gemma3_text", "rope_parameters": kinds})
    config = json.loads((folder / "config.json").read_text())
    assert (config["rope_theta"], config["rope_local_base_freq"], config["rope_scaling"]) == (1e6, 1e4, None)
