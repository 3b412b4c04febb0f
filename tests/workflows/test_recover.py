"""From folder to folder: prune with recovery, recover a checkpoint, reload, resume, bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.checkpoint.inspection import inspect_checkpoint
from sparsedeploy.checkpoint.masks import FILE as MASKS
from sparsedeploy.checkpoint.masks import load_masks
from sparsedeploy.errors import UserError
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.loading import load_model
from sparsedeploy.models.low_rank import LowRankLinear, load_adapter
from sparsedeploy.models.structure import find_decoder_stack
from sparsedeploy.recovery.options import DataOptions
from sparsedeploy.recovery.state import RunState
from sparsedeploy.workflows.options import PruneOptions, RecoverOptions, RecoverRunOptions, RunOptions
from sparsedeploy.workflows.prune import prune
from sparsedeploy.workflows.recover import prune_and_recover, recover_checkpoint
from tests.small_models import save_model

TRAINING = {"learning_rate": 1e-2, "accumulation": 1, "save_every": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, its pruned checkpoint and training text."""
    folder = tmp_path_factory.mktemp("recover")
    save_model(folder / "dense")
    rows = [{"text": f"row {at}: the quick brown fox jumps over the lazy dog {at * 7}"} for at in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    prune(str(folder / "dense"), folder / "pruned", pruning(folder))
    return folder


def pruning(folder: Path, **changes: Any) -> PruneOptions:
    calibration = CalibrationOptions(str(folder / "text.txt"), sequences=3, length=32, batch_size=2)
    return dataclasses.replace(PruneOptions(sparsity=0.6, calibration=calibration), **changes)


def options(folder: Path, method: str, **changes: Any) -> RecoverOptions:
    data = DataOptions(str(folder / "rows.jsonl"), max_length=48)
    known = {"losa": {"steps": 2, "first_rank": 2}, "sparselo": {"rank": 4}, "elsa": {"interval": 2}}
    values: dict[str, Any] = known.get(method, {"rank": 2})
    return dataclasses.replace(RecoverOptions(method, values, data, TRAINING), **changes)


def logits(folder: Path) -> torch.Tensor:
    tokens = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return load_model(folder)(input_ids=tokens).logits


@pytest.mark.parametrize("method", ["losa", "sparse-lora", "lora", "sparselo", "elsa"])
def test_prune_with_recovery_writes_a_sound_checkpoint(method: str, folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prune_and_recover(str(folders / "dense"), out, pruning(folders), options(folders, method))
    inspection = inspect_checkpoint(out)
    assert inspection.problems == []
    assert inspection.sparsity == pytest.approx(0.6, abs=2e-3)
    assert manifest.recovery.method == method
    assert not list(tmp_path.glob(".*")), "nothing is left of the run's state"
    beside = method in ("lora", "sparselo")
    assert (out / "adapter").is_dir() == beside
    model = load_model(out)
    assert any(isinstance(module, LowRankLinear) for module in model.modules()) == beside
    masks = load_masks(out / MASKS, {m.name: m.columns for m in inspection.modules})
    linears = find_decoder_stack(model).all_linears()
    assert all(not linears[name].weight[~mask].any() for name, mask in masks.items())
    assert not torch.equal(logits(out), logits(folders / "dense"))


@pytest.mark.parametrize("method", ["losa", "sparse-lora", "lora", "sparselo", "elsa"])
def test_recover_a_checkpoint(method: str, folders: Path, tmp_path: Path) -> None:
    manifest = recover_checkpoint(folders / "pruned", tmp_path / "out", options(folders, method))
    assert inspect_checkpoint(tmp_path / "out").problems == []
    assert manifest.to_json()["source"] == json.loads((folders / "pruned" / "sparsity.json").read_text())["source"]
    if method in ("sparse-lora", "lora"):  # their masks are the checkpoint's; the others prune anew
        names = {m.name: m.columns for m in inspect_checkpoint(folders / "pruned").modules}
        before, after = load_masks(folders / "pruned" / MASKS, names), load_masks(tmp_path / "out" / MASKS, names)
        assert all(torch.equal(before[name], after[name]) for name in names)


def test_both_ways_to_recover_give_the_same_weights(folders: Path, tmp_path: Path) -> None:
    once = prune_and_recover(str(folders / "dense"), tmp_path / "a", pruning(folders), options(folders, "sparse-lora"))
    twice = recover_checkpoint(folders / "pruned", tmp_path / "b", options(folders, "sparse-lora"))
    assert once.files["model.safetensors"] == twice.files["model.safetensors"]
    assert once.files[MASKS] == twice.files[MASKS]


def test_saving_keeps_logits_and_the_adapter_is_part_of_the_hash(folders: Path, tmp_path: Path) -> None:
    """The merged or attached model that was written computes what a reload computes."""
    from sparsedeploy.workflows import recovery_run as module

    seen: list[torch.Tensor] = []
    original = module.write_checkpoint

    def write(*args: Any, **kwargs: Any) -> Any:
        manifest = original(*args, **kwargs)
        from sparsedeploy.models.low_rank import attach_low_rank

        model = load_model(folders / "dense")
        for name, linear in find_decoder_stack(model).all_linears().items():
            linear.weight.data.copy_(find_decoder_stack(kwargs["model"]).all_linears()[name].weight)
        attach_low_rank(model, kwargs["low_rank"])
        tokens = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            seen.append(model(input_ids=tokens).logits)
        return manifest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_checkpoint", write)
        for method in ("losa", "lora", "sparselo"):
            prune_and_recover(str(folders / "dense"), tmp_path / method, pruning(folders), options(folders, method))
            assert torch.equal(logits(tmp_path / method), seen.pop())
    before = model_sha256(tmp_path / "lora")
    (tmp_path / "lora" / "adapter" / "adapter_model.safetensors").write_bytes(b"other")
    assert model_sha256(tmp_path / "lora") != before
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is truncated or corrupt"):
        load_model(tmp_path / "lora")


def test_the_adapter_folder_is_in_pefts_format(folders: Path, tmp_path: Path) -> None:
    prune_and_recover(str(folders / "dense"), tmp_path / "out", pruning(folders), options(folders, "sparselo"))
    folder = tmp_path / "out" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    factors = load_adapter(folder)
    assert set(config["target_modules"]) == set(factors)
    assert all(len(factor.a) == 4 and factor.scale == 1.0 for factor in factors.values())


def test_peft_loads_the_adapter_folder(folders: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    prune_and_recover(str(folders / "dense"), tmp_path / "out", pruning(folders), options(folders, "lora"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    tokens = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, logits(tmp_path / "out"), rtol=1e-4, atol=1e-5)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", ["losa", "sparse-lora"])
def test_killed_and_resumed_writes_the_same_files(
    method: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = (str(folders / "dense"), pruning(folders), options(folders, method))
    whole = prune_and_recover(run[0], tmp_path / "whole", *run[1:])
    original = RunState.save
    saves = 0

    def save(self: RunState, *args: Any) -> None:
        nonlocal saves
        original(self, *args)
        saves += 1
        if saves == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "save", save)
        with pytest.raises(Killed):
            prune_and_recover(run[0], tmp_path / "out", *run[1:])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"cannot resume: .*seed"):
        prune_and_recover(
            run[0], tmp_path / "out", run[1], dataclasses.replace(run[2], seed=1), RunOptions(resume=True)
        )
    resumed = prune_and_recover(run[0], tmp_path / "out", *run[1:], RunOptions(resume=True))
    assert resumed.files["model.safetensors"] == whole.files["model.safetensors"]
    assert resumed.files[MASKS] == whole.files[MASKS]
    assert not list(tmp_path.glob(".*"))


def refused(message: str, call: Any, out: Path) -> None:
    with pytest.raises(UserError, match=message):
        call()
    assert not out.exists()


def test_bad_input_of_prune_and_recover(folders: Path, tmp_path: Path) -> None:
    dense, out = str(folders / "dense"), tmp_path / "out"

    def run(method: str, choice: PruneOptions | None = None, **changes: Any) -> Any:
        return lambda: prune_and_recover(dense, out, choice or pruning(folders), options(folders, method, **changes))

    refused("no training text was given", run("losa", data=None), out)
    refused("unknown recovery method 'lsoa'", run("lsoa"), out)
    refused("losa has no option 'ranks'", run("losa", options={"ranks": 3}), out)
    refused("training has no option 'lr'", run("losa", training={"lr": 1}), out)
    refused("too few for 25 steps", run("losa", options={"steps": 25}), out)
    search = pruning(folders, allocation="atp", allocation_options={"search": True})
    refused("chooses its rates", run("losa", search), out)
    short = DataOptions(str(folders / "rows.jsonl"), min_length=100)
    refused("every sequence .* is shorter than 100", run("losa", data=short), out)


def test_bad_input_of_recover(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lora = options(folders, "sparse-lora")
    refused("has no sparsity.json", lambda: recover_checkpoint(folders / "dense", out, lora), out)

    broken = shutil.copytree(folders / "pruned", tmp_path / "dense-weights")
    shutil.copyfile(folders / "dense" / "model.safetensors", broken / "model.safetensors")
    refused("has weights that its mask prunes", lambda: recover_checkpoint(broken, out, lora), out)
    (broken / MASKS).unlink()
    refused("masks in .* cannot be read", lambda: recover_checkpoint(broken, out, lora), out)

    other = save_model(tmp_path / "other", seed=5)
    losa = options(folders, "losa")
    for place, message in ((other, "is not the model that"), (tmp_path / "nowhere", "not at .*nowhere")):
        dense = str(place)
        refused(
            message,
            lambda dense=dense: recover_checkpoint(folders / "pruned", out, losa, RecoverRunOptions(dense=dense)),
            out,
        )
    recover_checkpoint(folders / "pruned", tmp_path / "lora", options(folders, "lora"))
    refused("adapters beside its weights", lambda: recover_checkpoint(tmp_path / "lora", out, lora), out)


def test_diverging_training_keeps_the_last_good_state(folders: Path, tmp_path: Path) -> None:
    """A real divergence: a learning rate that overflows; then resumed with a sane one."""
    wild = options(folders, "sparse-lora", training={**TRAINING, "learning_rate": 1e18, "clip": 1e9})
    with pytest.raises(UserError, match=r"(loss|gradient) is (nan|inf) at step \d+; the state after step \d+ is kept"):
        recover_checkpoint(folders / "pruned", tmp_path / "out", wild)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.recovery").is_dir()
    assert inspect_checkpoint(folders / "pruned").problems == []


@pytest.mark.parametrize("method", ["sparse-lora", "elsa"])
def test_a_checkpoint_learns_from_the_dense_model(method: str, folders: Path, tmp_path: Path) -> None:
    wanted = options(folders, method, loss="kl")
    one = prune_and_recover(str(folders / "dense"), tmp_path / "one", pruning(folders), wanted)
    two = recover_checkpoint(folders / "pruned", tmp_path / "two", wanted)
    assert one.recovery is not None
    assert two.recovery is not None
    assert one.recovery.report["last_loss"] == two.recovery.report["last_loss"]
    assert two.request["recover"]["loss"] == "kl"
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "two"))


def test_the_dense_model_that_is_learnt_from_must_be_there_and_the_same(folders: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "other", seed=5)
    wanted = options(folders, "sparse-lora", loss="both")
    with pytest.raises(UserError, match="is not the model that"):
        recover_checkpoint(
            folders / "pruned", tmp_path / "out", wanted, RecoverRunOptions(dense=str(tmp_path / "other"))
        )
    with pytest.raises(UserError, match="reads the dense model, which is not at"):
        recover_checkpoint(
            folders / "pruned", tmp_path / "out", wanted, RecoverRunOptions(dense=str(tmp_path / "none"))
        )
    with pytest.raises(UserError, match="sparselo does not train"):
        recover_checkpoint(folders / "pruned", tmp_path / "out", options(folders, "sparselo", loss="kl"))
    assert not (tmp_path / "out").exists()
