"""Sweeps: the grid, cells that are kept, processes that die, the front and the pick."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsedeploy.checkpoint.manifest import load_manifest
from sparsedeploy.errors import UserError
from sparsedeploy.models.options import LoadOptions
from sparsedeploy.reporting.sweep import marked
from sparsedeploy.workflows import sweep as sweeps
from sparsedeploy.workflows.sweep import check_wish, picked, run_sweep
from sparsedeploy.workflows.sweep_file import load_sweep
from tests.small_models import save_model

CPU = LoadOptions(device="cpu")
TEXT = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    save_model(folder / "dense")
    (folder / "text.txt").write_text(TEXT * 60)
    return folder


def content(place: Path, **changes: Any) -> dict[str, Any]:
    text = str(place / "text.txt")
    return {
        "model": str(place / "dense"),
        "rates": [0.5],
        "methods": ["magnitude"],
        "eval": {"data": text, "context": 32, "max_windows": 4},
        **changes,
    }


def written(folder: Path, values: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def cell(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name / "cell.json").read_text())
    return found


def test_the_grid(place: Path, tmp_path: Path) -> None:
    values = content(
        place,
        rates=[0.5, 0.725, "2:4"],
        methods=["magnitude", {"method": "sparsegpt", "name": "sgpt-64", "method_options": {"block": 64}}],
        allocations=["uniform", {"allocation": "owl", "allocation_options": {"strength": 0.1}}],
        recoveries=["none", "sparse-lora", {"method": "elsa", "loss": "kl", "name": "elsa-kl"}],
        calibration={"data": str(place / "text.txt"), "sequences": 2, "length": 32},
        train={"data": str(place / "text.txt")},
    )
    sweep = load_sweep(written(tmp_path, values))
    names = [one.name for one in sweep.cells]
    assert names[0] == "dense"
    assert len(names) == len(set(names)) == 1 + 3 * (2 * 2 + 2 * 2 + 2)
    assert "sgpt-64-owl-72.5-elsa-kl" in names
    assert "magnitude-uniform-2of4-sparse-lora" in names
    assert not [name for name in names if "owl-2of4" in name], "a fixed pattern has nothing to allocate"
    one = next(one for one in sweep.cells if one.name == "sgpt-64-owl-72.5")
    assert one.recipe["prune"] == {
        "sparsity": 0.725,
        "method": "sparsegpt",
        "method_options": {"block": 64},
        "allocation": "owl",
        "allocation_options": {"strength": 0.1},
    }
    for at, name in enumerate(names):
        base = sweep.cells[at].base
        assert base is None or names.index(base) < names.index(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": [0.5]}, "unknown line 'rate'"),
        ({"rates": 0.5}, "rates is not a list"),
        ({"rates": []}, "rates is not a list"),
        ({"rates": ["2:0"]}, "2:0"),
        ({"methods": ["wandb"]}, "wandb"),
        ({"methods": [{"options": {}}]}, "entry is a mapping"),
        ({"allocations": [{"allocation": "owl", "allocation_options": {"x": 1}}]}, "owl has no option 'x'"),
        ({"recoveries": ["lorra"]}, "lorra"),
        ({"eval": {"data": "t", "windows": 3}}, "has no option 'windows'"),
        ({"eval": {}}, "no text to evaluate on"),
        ({"rates": [0.5, 0.5]}, "names the cell magnitude-uniform-50 twice"),
        ({"train": {"data": "t", "seed": 3}}, "train sets seed, which is the recovery's"),
        (
            {"methods": [{"method": "magnitude", "lm_head": True}], "recoveries": ["sparselo"]},
            "recovery does not keep a pruned output head sparse",
        ),
    ],
)
def test_a_file_that_cannot_be_is_refused(changes: dict[str, Any], message: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_sweep(written(tmp_path, content(place, **changes)))


@pytest.mark.slow
def test_cells_are_filled_kept_and_reported(place: Path, tmp_path: Path) -> None:
    training = {"learning_rate": 1e-3, "accumulation": 1}
    values = content(
        place,
        recoveries=[{"method": "sparse-lora", "training": training, "options": {"rank": 2}}, {"method": "lora"}],
        train={"data": str(place / "text.txt"), "max_length": 32, "samples": 8},
    )
    out = tmp_path / "out"
    report = run_sweep(load_sweep(written(tmp_path, values)), out, jobs=2, load=CPU)
    rows = {row["name"]: row for row in report["cells"]}
    assert list(rows) == ["dense", *(f"magnitude-uniform-50{end}" for end in ("", "-sparse-lora", "-lora"))]
    assert all(row["perplexity"] > 1 and row["error"] is None for row in rows.values())
    assert rows["magnitude-uniform-50"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert rows["magnitude-uniform-50"]["packed_bytes"] < rows["dense"]["packed_bytes"]
    assert not rows["magnitude-uniform-50-lora"]["deployable"], "factors stand beside its weights"
    assert rows["magnitude-uniform-50-sparse-lora"]["deployable"]
    html = (out / "sweep.html").read_text()
    assert all(name in html for name in rows)
    assert "| magnitude-uniform-50-lora |" in (out / "sweep.md").read_text()
    stamps = {name: (out / name / "cell.json").stat().st_mtime_ns for name in rows}
    (out / "magnitude-uniform-50-lora" / "cell.json").unlink()
    again = run_sweep(load_sweep(written(tmp_path, values)), out, jobs=1, load=CPU)
    assert [row["perplexity"] for row in again["cells"]] == [row["perplexity"] for row in report["cells"]]
    changed = [name for name in rows if (out / name / "cell.json").stat().st_mtime_ns != stamps[name]]
    assert changed == ["magnitude-uniform-50-lora"]
    (out / "magnitude-uniform-50" / "cell.json").unlink()
    values["eval"]["max_windows"] = 3
    with pytest.raises(UserError, match="is a cell of another sweep"):
        run_sweep(load_sweep(written(tmp_path, values)), out)


@pytest.mark.slow
def test_a_process_that_is_killed_loses_its_cell_only(place: Path, tmp_path: Path) -> None:
    """The first prune is killed as soon as it runs; its own recovery is left out, the other cell is filled."""
    values = content(
        place,
        rates=[0.5, 0.6],
        recoveries=["lora"],
        train={"data": str(place / "text.txt"), "max_length": 32, "samples": 8},
    )
    out = tmp_path / "out"
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            for process in list(sweeps._RUNNING):
                arguments = process.popen.args
                if "prune" in arguments and any("uniform-50" in str(part) for part in arguments):
                    os.kill(process.popen.pid, signal.SIGKILL)
                    killed.append(process.popen.pid)
            time.sleep(0.01)

    watcher = threading.Thread(target=kill, daemon=True)
    watcher.start()
    with pytest.raises(
        UserError, match=r"2 of 5 cells failed; magnitude-uniform-50: its process was killed by signal 9"
    ):
        run_sweep(load_sweep(written(tmp_path, values)), out, load=CPU)
    watcher.join()
    assert cell(out, "magnitude-uniform-60-lora")["perplexity"] > 1
    assert "which it starts from, failed" in cell(out, "magnitude-uniform-50-lora")["error"]
    report = run_sweep(load_sweep(written(tmp_path, values)), out, load=CPU)
    assert all(row["perplexity"] for row in report["cells"])


@pytest.mark.slow
def test_what_an_interrupted_cell_left_is_not_taken_for_another_request(place: Path, tmp_path: Path) -> None:
    """A sweep is stopped in the middle of a cell; then the file asks for something else under the same name."""
    out = tmp_path / "out"

    def stop() -> None:
        while not (out / "magnitude-uniform-50" / "checkpoint").is_dir():
            time.sleep(0.01)
        for process in list(sweeps._RUNNING):
            process.kill()

    watcher = threading.Thread(target=stop, daemon=True)
    watcher.start()
    with pytest.raises(UserError, match="cells failed"):
        run_sweep(load_sweep(written(tmp_path, content(place))), out, load=CPU)
    watcher.join()
    other = content(place, methods=[{"method": "magnitude", "method_options": {"scope": "row"}, "name": "magnitude"}])
    with pytest.raises(UserError, match="is a cell of another sweep"):
        run_sweep(load_sweep(written(tmp_path, other)), out, load=CPU)


@pytest.mark.slow
def test_a_cell_that_fails_says_why_in_its_own_words(place: Path, tmp_path: Path) -> None:
    values = content(place, rates=["3:7"])
    with pytest.raises(UserError, match=r"1 of 2 cells failed; magnitude-uniform-3of7: .*7"):
        run_sweep(load_sweep(written(tmp_path, values)), tmp_path / "out")


@pytest.mark.slow
def test_a_finished_cell_is_of_one_type_and_text(place: Path, tmp_path: Path) -> None:
    """Another --dtype, another content of the text, or another file under the same names: nothing is mixed."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 60)
    values = content(place, eval={"data": str(text), "context": 32, "max_windows": 4})
    out = tmp_path / "out"
    run_sweep(load_sweep(written(tmp_path, values)), out, load=CPU)
    recipe = (out / "magnitude-uniform-50" / "recipe.yaml").read_bytes()
    with pytest.raises(UserError, match=r"is a cell of another sweep \(dtype differ"):
        run_sweep(load_sweep(written(tmp_path, values)), out, load=LoadOptions(device="cpu", dtype="bfloat16"))
    other = {**values, "methods": [{"method": "magnitude", "method_options": {"scope": "row"}, "name": "magnitude"}]}
    with pytest.raises(UserError, match=r"is a cell of another sweep \(recipe differ"):
        run_sweep(load_sweep(written(tmp_path, other)), out, load=CPU)
    assert (out / "magnitude-uniform-50" / "recipe.yaml").read_bytes() == recipe, "nothing was written over it"
    text.write_text("Another text, of the same length as far as anybody cares to count. " * 60)
    with pytest.raises(UserError, match=r"is a cell of another sweep \(texts differ"):
        run_sweep(load_sweep(written(tmp_path, values)), out, load=CPU)


@pytest.mark.slow
def test_rounded_weights_are_counted_by_their_bits(place: Path, tmp_path: Path) -> None:
    methods = ["wanda", {"method": "wanda", "quantize": "int8", "name": "wanda-int8"}]
    calibration = {"data": str(place / "text.txt"), "sequences": 2, "length": 32}
    values = content(place, methods=methods, calibration=calibration)
    report = run_sweep(load_sweep(written(tmp_path, values)), tmp_path / "out", load=CPU)
    sizes = {one["name"]: one["packed_bytes"] for one in report["cells"]}
    manifest = load_manifest(tmp_path / "out" / "wanda-int8-uniform-50" / "checkpoint")
    modules = manifest.modules.values()
    kept = sum(one.rows * one.columns - one.zeros for one in modules)
    scales = sum(one.rows * -(-one.columns // 32) for one in modules)
    assert sizes["wanda-uniform-50"] - sizes["wanda-int8-uniform-50"] == kept - 2 * scales


def row(name: str, size: float, perplexity: float | None, adapter: bool = False) -> dict[str, Any]:
    return {"name": name, "packed_bytes": size * 1e6, "perplexity": perplexity, "adapter": adapter}


def test_front_and_pick() -> None:
    sizes = {"dense": (100, 10.0), "a": (60, 10.4), "b": (60, 10.2), "c": (40, 12.0), "d": (45, 12.5), "g": (30, 40.0)}
    plain = [row(name, *values) for name, values in sizes.items()]
    rows = marked([*plain, row("e", 30, 9.0, adapter=True), row("f", 20, None)])
    assert [one["name"] for one in rows if one["front"]] == ["dense", "b", "c", "g"]
    assert picked(rows, "smallest within 5 % of dense")["name"] == "b"
    assert picked(rows, "smallest within 25% of dense")["name"] == "c"
    assert picked(rows, "best below 50 MB")["name"] == "c"
    with pytest.raises(UserError, match="no cell is the smallest within 1 % of dense"):
        picked(rows, "smallest within 1 % of dense")
    with pytest.raises(UserError, match="cannot read the wish"):
        check_wish("the best")
    diverged = marked([row("dense", 100, None), row("a", 60, 10.4)])
    with pytest.raises(UserError, match="the dense model has diverged"):
        picked(diverged, "smallest within 5 % of dense")


def test_ray_workers_fill_the_cells(place: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="ray is an optional extra")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        values = content(place, rates=[0.5, 0.6])
        report = run_sweep(load_sweep(written(tmp_path, values)), tmp_path / "out", jobs=2, on="ray")
    finally:
        ray.shutdown()
    assert all(one["perplexity"] for one in report["cells"])


def test_without_ray_the_reason_is_said(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="--on ray needs the package ray"):
        run_sweep(load_sweep(written(tmp_path, content(place))), tmp_path / "out", on="ray")
