"""llm-compressor itself replays our recipes, prunes for us and quantises what we pruned."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsedeploy.artifacts.description import load_artifact
from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.checkpoint.inspection import inspect_checkpoint
from sparsedeploy.checkpoint.manifest import load_manifest
from sparsedeploy.checkpoint.masks import FILE, load_masks
from sparsedeploy.errors import UserError
from sparsedeploy.plan import NM, ModuleTarget, SparsityPlan
from sparsedeploy.reference import reference_model
from sparsedeploy.runtimes import llmcompressor
from sparsedeploy.runtimes.environments import Environment
from sparsedeploy.runtimes.installation import process_environment
from sparsedeploy.targets.registry import export_checkpoint
from sparsedeploy.workflows.options import PruneOptions, RunOptions
from sparsedeploy.workflows.prune import prune
from sparsedeploy.workflows.prune_by_llmcompressor import mask_from_zeros, prune_with_llmcompressor
from tests.small_models import save_model

TEXT = CalibrationOptions(data="stdlib", sequences=8, length=128)
# SparseGPT selects within blocks of so many columns.
BLOCK = 128
CASES = {
    "wanda": PruneOptions(sparsity=0.6, method="wanda", allocation="owl", calibration=TEXT),
    "sparsegpt": PruneOptions(sparsity=0.6, method="sparsegpt", allocation="owl", calibration=TEXT),
    "wanda 2:8": PruneOptions(pattern="2:8", method="wanda", calibration=TEXT),
    "sparsegpt 2:4": PruneOptions(pattern="2:4", method="sparsegpt", calibration=TEXT),
    "sparsegpt mixed-4:8": PruneOptions(pattern="mixed-4:8", method="sparsegpt", allocation="owl", calibration=TEXT),
}
# Least agreement of masks in a module and over all. Measured: Wanda 100 %; SparseGPT 98.66 % in the worst module and
# 99.80 % over all: rounding in float32 turns near-ties, and what they change moves on to later columns and layers.
LEAST_AGREEMENT = {"wanda": (0.9995, 0.9999), "sparsegpt": (0.98, 0.995)}


@dataclass(frozen=True)
class Checkpoint:
    """A folder that the built-in engine pruned."""

    folder: Path
    plan: SparsityPlan
    masks: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def environment() -> Environment:
    try:
        return llmcompressor.environment()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """The tiny reference model, pruned as one of ``CASES`` says."""
    made: dict[str, Checkpoint] = {}

    def make(case: str) -> Checkpoint:
        if case not in made:
            folder = tmp_path_factory.mktemp("pruned") / "model"
            manifest = prune(str(reference_model("tiny")), folder, CASES[case], RunOptions(device="cpu"))
            plan = manifest.plan
            masks = load_masks(folder / FILE, {target.name: target.columns for target in plan.targets})
            made[case] = Checkpoint(folder, plan, masks)
        return made[case]

    return make


@pytest.mark.llmcompressor
@pytest.mark.parametrize("case", CASES)
def test_the_recipe_replays_to_the_same_masks_and_rates(
    case: str, environment: Environment, checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    pruned = checkpoint(case)
    export_checkpoint(pruned.folder, "llmcompressor", tmp_path / "out")
    tokens = load_file(tmp_path / "out" / "calibration.safetensors")["tokens"]
    dense = Path(json.loads((tmp_path / "out" / "dense_model.json").read_text())["folder"])
    weights, _ = llmcompressor.prune_by_recipe(
        environment, dense, tmp_path / "out" / "recipe.yaml", pruned.plan, tokens, device="cpu"
    )
    in_module, over_all = LEAST_AGREEMENT[CASES[case].method]
    report, agreed = [], 0
    for target in pruned.plan.targets:
        zero = weights[target.name] == 0
        same = int((zero == ~pruned.masks[target.name]).sum())
        agreed += same
        agreement = same / target.size
        surplus = int(zero.sum()) - target.zeros
        report.append(f"{target.name}: agreement {agreement:.5f}, rate {float(zero.double().mean()):.6f}, {surplus:+d}")
        most = -(-target.columns // BLOCK) if case == "sparsegpt" else 0
        assert 0 <= surplus <= most, report[-1]
        assert agreement >= in_module, report[-1]
    agreement = agreed / sum(target.size for target in pruned.plan.targets)
    print("\n".join([f"{case}: agreement {agreement:.6f}", *report]))
    assert agreement >= over_all


@pytest.mark.llmcompressor
def test_the_exported_script_replays_alone_and_refuses_another_model(
    environment: Environment, checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    pruned = checkpoint("wanda")
    export_checkpoint(pruned.folder, "llmcompressor", tmp_path / "out")

    def run(*more: object) -> subprocess.CompletedProcess[str]:
        command = [str(environment.python), str(tmp_path / "out" / "replay.py"), "--output", str(tmp_path / "replayed")]
        variables = process_environment(environment.runtime)
        return subprocess.run([*command, *map(str, more)], capture_output=True, text=True, env=variables, check=False)

    refused = run("--model", save_model(tmp_path / "other"))
    assert refused.returncode == 1
    assert refused.stderr.strip().endswith("give another folder with --model")
    done = run()
    assert done.returncode == 0, done.stderr
    replayed = load_file(tmp_path / "replayed" / "model.safetensors")
    for name, mask in pruned.masks.items():
        assert torch.equal(replayed[f"{name}.weight"] == 0, ~mask)


@pytest.mark.llmcompressor
@pytest.mark.parametrize("case", ["wanda", "sparsegpt", "sparsegpt mixed-4:8"])
def test_the_engine_writes_a_sound_checkpoint(
    case: str, environment: Environment, checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    manifest = prune_with_llmcompressor(
        str(reference_model("tiny")), tmp_path / "out", CASES[case], RunOptions(device="cpu")
    )
    ours = load_manifest(checkpoint(case).folder)
    assert inspect_checkpoint(tmp_path / "out").problems == []
    assert manifest.engine.versions["llmcompressor"] == llmcompressor.pinned_version()
    for key in ("plan", "achieved", "calibration", "method", "options"):
        assert getattr(manifest, key) == getattr(ours, key)


@pytest.mark.llmcompressor
@pytest.mark.parametrize(
    ("scheme", "algorithm"), [*((scheme, "round") for scheme in ("fp8-dynamic", "w8a8", "w4a16")), ("w4a16", "gptq")]
)
def test_pruned_weights_stay_zero_when_quantised(
    scheme: str, algorithm: Any, environment: Environment, checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    pruned = checkpoint("sparsegpt")
    options = {"quantize": scheme, "algorithm": algorithm, "windows": 8}
    export_checkpoint(pruned.folder, "vllm", tmp_path / "out", options)
    artifact = load_artifact(tmp_path / "out", verify=True)
    found = artifact.quantization
    assert found is not None
    assert (found.scheme, found.algorithm, found.revived) == (scheme, algorithm, 0)
    assert found.pruned == sum(target.zeros for target in pruned.plan.targets)
    assert found.group_size == (32 if scheme == "w4a16" else None), "352 inputs are no multiple of 128 or 64"
    assert found.perplexity_before is not None
    assert found.perplexity_after is not None
    assert found.perplexity_after == pytest.approx(found.perplexity_before, rel=0.05)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    # Read here without compressed-tensors: a zero weight is a zero integer, or 8 in packed 4-bit nibbles.
    name, mask = next(iter(pruned.masks.items()))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    if scheme == "w4a16":
        packed = stored[f"{name}.weight_packed"]
        values = torch.stack([(packed >> 4 * nibble & 15) - 8 for nibble in range(8)], dim=-1).flatten(1)
    else:
        values = stored[f"{name}.weight"].float()
    assert not values[~mask].any()
    assert values[mask].any()


@pytest.mark.llmcompressor
def test_a_model_that_llmcompressor_traces_wrongly_is_refused(environment: Environment, tmp_path: Path) -> None:
    model = save_model(tmp_path / "dense", "mistral")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    text = CalibrationOptions(data=str(tmp_path / "text.txt"), sequences=2, length=16)
    with pytest.raises(UserError, match=r"traces MistralForCausalLM wrongly: the inputs of .*o_proj are off"):
        prune_with_llmcompressor(str(model), tmp_path / "out", PruneOptions(sparsity=0.5, calibration=text))
    assert not (tmp_path / "out").exists()


@pytest.mark.llmcompressor
def test_another_version_is_refused(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmcompressor, "pinned_version", lambda: "9.9")
    message = r"has llm-compressor 0\.14\.0\.1, this sparsedeploy works with 9\.9\. Run: sparsedeploy runtime install"
    with pytest.raises(UserError, match=message), llmcompressor.open_worker(environment):
        pass


def test_a_missing_environment_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(tmp_path / "home"))
    message = "runtime llmcompressor is not installed. Run: sparsedeploy runtime install llmcompressor"
    model = save_model(tmp_path / "dense")
    with pytest.raises(UserError, match=message):
        prune_with_llmcompressor(str(model), tmp_path / "out", PruneOptions(sparsity=0.5))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path, CalibrationOptions]:
    """A dense and a Wanda-pruned folder and the text between them."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    calibration = CalibrationOptions(data=str(text), sequences=2, length=32)
    dense = save_model(tmp_path / "dense")
    prune(
        str(dense), tmp_path / "sparse", PruneOptions(sparsity=0.5, calibration=calibration), RunOptions(device="cpu")
    )
    return dense, tmp_path / "sparse", calibration


def test_the_export_holds_what_the_checkpoint_was_made_from(
    small: tuple[Path, Path, CalibrationOptions], tmp_path: Path
) -> None:
    dense, sparse, _ = small
    artifact = export_checkpoint(sparse, "llmcompressor", tmp_path / "out")
    manifest = load_manifest(sparse)
    assert artifact.sparsity.fraction == manifest.achieved
    assert set(artifact.files) == {
        "README.md",
        "calibration.safetensors",
        "dense_model.json",
        "plan.json",
        "recipe.yaml",
        "replay.py",
    }
    assert SparsityPlan.load(tmp_path / "out" / "plan.json") == manifest.plan
    described = json.loads((tmp_path / "out" / "dense_model.json").read_text())
    assert described["folder"] == str(dense)
    assert described["sha256"] == manifest.source.sha256
    assert load_file(tmp_path / "out" / "calibration.safetensors")["tokens"].shape == (2, 32)


def test_another_dense_model_is_refused(small: tuple[Path, Path, CalibrationOptions], tmp_path: Path) -> None:
    _, sparse, _ = small
    other = save_model(tmp_path / "other", dtype=torch.bfloat16)
    with pytest.raises(UserError, match="is not the dense model that the checkpoint was pruned from"):
        export_checkpoint(sparse, "llmcompressor", tmp_path / "out", {"model": str(other)})
    with pytest.raises(
        UserError, match=r"the dense model cannot be found: no model folder at .* --target-option model"
    ):
        export_checkpoint(sparse, "llmcompressor", tmp_path / "out", {"model": str(tmp_path / "nowhere")})
    assert not (tmp_path / "out").exists()


def test_changed_text_is_refused(small: tuple[Path, Path, CalibrationOptions], tmp_path: Path) -> None:
    _, sparse, calibration = small
    Path(calibration.data).write_text("something else altogether, and more of it. " * 60)
    with pytest.raises(UserError, match=r"gives other tokens than the checkpoint was pruned with. Name that text"):
        export_checkpoint(sparse, "llmcompressor", tmp_path / "out")


def test_what_cannot_be_replayed_or_quantised_is_refused(
    small: tuple[Path, Path, CalibrationOptions], tmp_path: Path
) -> None:
    dense, sparse, calibration = small
    by_size = tmp_path / "magnitude"
    prune(
        str(dense),
        by_size,
        PruneOptions(sparsity=0.5, method="magnitude", calibration=calibration),
        RunOptions(device="cpu"),
    )
    for folder, target, quantize, message in (
        (dense, "llmcompressor", None, "has no sparsity.json. Give a folder that sparsedeploy prune wrote"),
        (dense, "vllm", "w8a8", "has no sparsity.json. Give a folder that sparsedeploy prune wrote"),
        (by_size, "llmcompressor", None, "cannot prune by magnitude .* Use --method sparsegpt or wanda"),
        (sparse, "vllm", "int3", "vllm: option quantize is 'int3'. It takes fp8-dynamic, w8a8 or w4a16"),
        (
            sparse,
            "deepsparse",
            "w8a8",
            "--target deepsparse cannot quantise. Use --target llamacpp or vllm, or leave --quantize out",
        ),
    ):
        with pytest.raises(UserError, match=message):
            export_checkpoint(folder, target, tmp_path / "out", quantize=quantize)
    assert not (tmp_path / "out").exists()


def test_surplus_zeros_count_as_kept() -> None:
    weight = torch.tensor([[0.0, 0.0, 1.0, 0.0], [2.0, 0.0, 3.0, 4.0]])
    mask = mask_from_zeros(weight, ModuleTarget("m", 2, 4, 1))
    assert mask.tolist() == [[False, False, True, True], [True, True, True, True]]
    by_group = mask_from_zeros(weight, ModuleTarget("m", 2, 4, 1, NM(3, 4)))
    assert by_group.tolist() == [[False, True, True, True], [True, False, True, True]]


def test_too_few_zeros_are_an_error() -> None:
    weight = torch.tensor([[0.0, 0.0, 1.0, 5.0], [2.0, 6.0, 3.0, 4.0]])
    with pytest.raises(UserError, match=r"left m short of the plan's 4 zeros .it has 2 zeros"):
        mask_from_zeros(weight, ModuleTarget("m", 2, 4, 2))
    with pytest.raises(UserError, match="does not follow 2:4"):
        mask_from_zeros(weight, ModuleTarget("m", 2, 4, 2, NM(2, 4)))
