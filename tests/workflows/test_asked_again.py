"""The manifest keeps the whole request: a checkpoint is recovered and exported as it was pruned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.calibration.text import recorded_tokens
from sparsedeploy.checkpoint.manifest import MANIFEST, EngineRecord, load_manifest
from sparsedeploy.errors import UserError
from sparsedeploy.models.loading import load_config
from sparsedeploy.models.tokenizer import load_tokenizer
from sparsedeploy.recovery.options import DataOptions
from sparsedeploy.workflows.options import PruneOptions, RecoverOptions
from sparsedeploy.workflows.plan import prepare
from sparsedeploy.workflows.prune import prune
from sparsedeploy.workflows.recover import prune_and_recover, recover_checkpoint
from tests.small_models import save_model

LOSA = {"steps": 1, "first_rank": 2}
TRAINING = {"learning_rate": 1e-3, "accumulation": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of three layers and a text whose column has a name of its own."""
    folder = tmp_path_factory.mktemp("asked")
    save_model(folder / "dense", num_hidden_layers=3)
    rows = [{"content": f"row {at}: the quick brown fox jumps over the lazy dog {at * 7}"} for at in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def pruning(folder: Path, **changes: Any) -> PruneOptions:
    calibration = CalibrationOptions(str(folder / "rows.jsonl"), field="content", sequences=4, length=32)
    return replace(PruneOptions(sparsity=0.6, calibration=calibration), **changes)


def recovery(folder: Path, method: str = "losa") -> RecoverOptions:
    if method == "sparselo":
        return RecoverOptions(method, {"rank": 2})
    data = DataOptions(str(folder / "rows.jsonl"), field="content", max_length=32)
    return RecoverOptions(method, LOSA, data, TRAINING)


def test_the_request_is_kept_whole(folder: Path, tmp_path: Path) -> None:
    asked = pruning(folder, allocation="owl", allocation_options={"m": "4"}, method="sparsegpt")
    manifest = prune(str(folder / "dense"), tmp_path / "out", asked)
    assert load_manifest(tmp_path / "out") == manifest
    assert manifest.request["prune"]["allocation_options"] == {"m": "4"}
    assert manifest.request["calibration"]["field"] == "content"
    assert manifest.calibration is not None
    assert (manifest.calibration.field, manifest.calibration.split) == ("content", "train")
    assert recorded_tokens(load_tokenizer(folder / "dense"), load_config(folder / "dense"), manifest).shape == (4, 32)


@pytest.mark.parametrize("method", ["losa", "sparselo"])
def test_options_of_a_mixed_pattern_are_used_again(folder: Path, tmp_path: Path, method: str) -> None:
    asked = pruning(folder, sparsity=None, pattern="mixed-2:8", pattern_options={"strength": 0}, allocation="dlp")
    first = prune(str(folder / "dense"), tmp_path / "pruned", asked)
    assert {str(target.pattern) for target in first.plan.targets} == {"2:8"}
    again = recover_checkpoint(tmp_path / "pruned", tmp_path / "out", recovery(folder, method))
    assert [target.pattern for target in again.plan.targets] == [target.pattern for target in first.plan.targets]


@pytest.mark.parametrize("method", ["losa", "sparselo"])
def test_a_checkpoint_of_a_search_is_recovered(folder: Path, tmp_path: Path, method: str) -> None:
    search = {"search": True, "trials": 2, "patience": 0, "windows": 1, "text": str(folder / "rows.jsonl")}
    asked = pruning(folder, allocation="atp", allocation_options=search, method="magnitude")
    first = prune(str(folder / "dense"), tmp_path / "pruned", asked)
    assert first.request["prune"]["allocation_options"]["search"] is True
    assert (first.plan.options["search"], first.plan.options["beta"]) == (False, first.plan.details["beta"])
    text = {"data": str(folder / "rows.jsonl"), "field": "content", "sequences": 4, "length": 32}
    again = recover_checkpoint(tmp_path / "pruned", tmp_path / "out", recovery(folder, method), calibration=text)
    assert again.plan.options["beta"] == first.plan.options["beta"]
    assert again.plan.targets == first.plan.targets


@pytest.mark.parametrize("changes", [{"reconstruct": True}, {"allocation": "auto"}])
def test_what_losa_cannot_prune_again_names_what_can(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """The remedy is one that ``recover`` has, and it works."""
    if "allocation" in changes:
        text = {"text": str(folder / "rows.jsonl"), "windows": 2, "confirm": 0, "database": str(tmp_path / "levels")}
        changes = {**changes, "allocation_options": text}
    prune(str(folder / "dense"), tmp_path / "pruned", pruning(folder, method="magnitude", **changes))
    with pytest.raises(UserError, match=r"losa prunes the dense model by itself.* Use .*sparse-lora"):
        recover_checkpoint(tmp_path / "pruned", tmp_path / "out", recovery(folder))
    lora = replace(recovery(folder), method="sparse-lora", options={"rank": 2})
    assert recover_checkpoint(tmp_path / "pruned", tmp_path / "out", lora).recovery is not None


def test_what_a_search_selects_on_is_part_of_the_request(folder: Path, tmp_path: Path) -> None:
    """A run that is resumed with another content of the text would choose another plan."""
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 60)
    asked = pruning(folder, allocation="auto", allocation_options={"text": str(text)}, method="magnitude")
    before = prepare(str(folder / "dense"), asked).request()
    assert prepare(str(folder / "dense"), asked).request() == before
    text.write_text("four five six " * 60)
    after = prepare(str(folder / "dense"), asked).request()
    assert {key for key in before if before[key] != after[key]} == {"selection"}


def test_the_program_that_pruned_is_still_named_after_a_recovery(folder: Path, tmp_path: Path) -> None:
    prune(str(folder / "dense"), tmp_path / "pruned", PruneOptions(sparsity=0.5, method="magnitude"))
    path = tmp_path / "pruned" / MANIFEST
    engine = {"name": "llmcompressor", "versions": {"llmcompressor": "0.14"}, "surplus_zeros": 7}
    path.write_text(json.dumps({**json.loads(path.read_text()), "engine": engine}))
    lora = replace(recovery(folder), method="sparse-lora", options={"rank": 2})
    again = recover_checkpoint(tmp_path / "pruned", tmp_path / "out", lora)
    assert again.engine == EngineRecord("llmcompressor", {"llmcompressor": "0.14"})


@pytest.mark.parametrize(("allocation", "used"), [("uniform", "uniform"), (None, "rmi"), ("dlp", "dlp")])
def test_losa_uses_the_allocation_that_was_asked_for(
    folder: Path, tmp_path: Path, allocation: str | None, used: str
) -> None:
    asked = pruning(folder, allocation=allocation)
    manifest = prune_and_recover(str(folder / "dense"), tmp_path / "out", asked, recovery(folder))
    assert manifest.plan.allocation == used
    assert manifest.request["prune"]["allocation"] == allocation


def test_format_1_is_read(folder: Path, tmp_path: Path) -> None:
    mixed = pruning(folder, sparsity=None, pattern="mixed-2:8", pattern_options={"strength": 0}, allocation="dlp")
    mixed = replace(mixed, calibration=replace(mixed.calibration, data=str(plain_text(folder)), field="text"))
    now = prune(str(folder / "dense"), tmp_path / "pruned", mixed)
    values = json.loads((tmp_path / "pruned" / MANIFEST).read_text())
    del values["request"], values["calibration"]["field"], values["calibration"]["split"]
    (tmp_path / "pruned" / MANIFEST).write_text(json.dumps({**values, "format": 1}))
    before = load_manifest(tmp_path / "pruned")
    assert replace(before, request=now.request) == now
    assert before.request["prune"]["pattern_options"]["strength"] == 0
    again = recover_checkpoint(tmp_path / "pruned", tmp_path / "out", recovery(folder))
    assert {str(target.pattern) for target in again.plan.targets} == {"2:8"}


def plain_text(folder: Path) -> Path:
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return folder / "text.txt"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 3, "has format 3, not 2"),
        ("source", "x", "'source' is a string, not an object"),
        ("modules", {}, "'modules' lacks model.layers.0"),
        ("calibration", {"data": 3}, "calibration: 'data' is a number, not a string"),
        ("files", {"a": 1}, "files: 'a' is a number, not a string"),
    ],
)
def test_a_broken_manifest_is_named(folder: Path, tmp_path: Path, key: str, value: Any, message: str) -> None:
    prune(str(folder / "dense"), tmp_path / "out", PruneOptions(sparsity=0.5, method="magnitude"))
    values = json.loads((tmp_path / "out" / MANIFEST).read_text())
    (tmp_path / "out" / MANIFEST).write_text(json.dumps({**values, key: value}))
    with pytest.raises(UserError) as error:
        load_manifest(tmp_path / "out")
    assert message in str(error.value)
