"""artifact.json: what is written is read back, and what is broken is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparsedeploy.artifacts import integrity
from sparsedeploy.artifacts.description import (
    Artifact,
    Check,
    Engine,
    Shapes,
    Source,
    Sparsity,
    hash_files,
    load_artifact,
    write_artifact,
)
from sparsedeploy.errors import UserError
from sparsedeploy.models.fingerprint import file_sha256
from sparsedeploy.reading import hashed


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(tmp_path / "home"))
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "config.json").write_text("{}")
    write_artifact(folder, artifact_of(folder))
    return folder


def artifact_of(folder: Path) -> Artifact:
    return Artifact(
        target="deepsparse",
        source=Source(name="model", sha256="ab" * 32),
        model_type="llama",
        shapes=Shapes(layers=2, kv_heads=2, head_dim=8, hidden=32, vocab=259, max_positions=None),
        dtype="float32",
        opset=14,
        files=hash_files(folder),
        sparsity=Sparsity(weights=1000, zeros=700),
        engine=Engine(name="deepsparse", version="1.8.0"),
        check=Check(tokens=15, largest_difference=1e-6, largest_logit=4.5),
    )


def edit(folder: Path, **changes: object) -> None:
    """Change the description as if it had been written so."""
    path = folder / "artifact.json"
    values = {**json.loads(path.read_text()), **changes}
    del values["sha256"]
    path.write_text(json.dumps(hashed(values)))


@pytest.mark.parametrize("check", [None, Check(tokens=15, largest_difference=1e-6, largest_logit=4.5)])
def test_round_trip(folder: Path, check: Check | None) -> None:
    artifact = dataclasses.replace(artifact_of(folder), check=check)
    write_artifact(folder, artifact)
    assert load_artifact(folder, verify=True) == artifact
    assert set(artifact.files) == {"model.onnx", "config.json"}
    written = json.loads((folder / "artifact.json").read_text())
    assert written["sparsity"] == {"weights": 1000, "zeros": 700, "fraction": 0.7}
    assert written["format"] == 1


def test_folder_without_description(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an exported artifact"):
        load_artifact(tmp_path)


def test_missing_file(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    with pytest.raises(UserError, match=r"lacks its file model\.onnx"):
        load_artifact(folder)


def test_a_changed_file_is_found_at_every_load(folder: Path) -> None:
    """Whether it was changed before the first load or after it, and whatever time it says."""
    file = folder / "model.onnx"
    sound, times = file.read_bytes(), file.stat()
    for _ in range(2):
        file.write_bytes(b"x" * len(sound))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        for verify in (False, False, True):
            with pytest.raises(
                UserError, match=r"model\.onnx was changed .*Copy the folder again, or export"
            ) as caught:
                load_artifact(folder, verify=verify)
            assert "\n" not in str(caught.value)
        file.write_bytes(sound)
        load_artifact(folder)


def test_hashes_are_compared_once_for_each_state_of_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def reading(path: Path) -> str:
        read.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(integrity, "file_sha256", reading)
    load_artifact(folder)
    load_artifact(folder)
    assert sorted(read) == ["config.json", "model.onnx"]
    (folder / "config.json").write_text("{}")
    load_artifact(folder)
    assert read[2:] == ["config.json"]
    load_artifact(folder, verify=True)
    assert len(read) == 5
    # The same files in another place were never read there.
    load_artifact(shutil.copytree(folder, folder.parent / "copy"))
    assert len(read) == 7


def test_a_cache_that_cannot_be_written_or_read_costs_time_only(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(home / "file"))
    (home / "file").write_text("no folder")
    load_artifact(folder)
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(home))
    load_artifact(folder)
    (kept,) = (home / "verified").iterdir()
    for nonsense in ("[]", "{", '{"model.onnx": 3}'):
        kept.write_text(nonsense)
        load_artifact(folder)
    assert set(json.loads(kept.read_text())) == {"model.onnx", "config.json"}


@pytest.mark.parametrize("tolerance", [-1.0, 1e9])
def test_tolerance_of_the_self_test_is_bounded(folder: Path, tolerance: float) -> None:
    edit(folder, self_test={"file": "model.onnx", "tokens": 4, "tolerance": tolerance})
    with pytest.raises(UserError, match="tolerance"):
        load_artifact(folder)


def edits() -> dict[str, Any]:
    """What a person may do to a description: name -> a change of its values in place."""

    def at(*place: str, value: Any) -> Any:
        def change(values: dict[str, Any]) -> None:
            for key in place[:-1]:
                values = values[key]
            values[place[-1]] = value

        return change

    return {
        "another engine version": at("engine", "version", value="1.9.0"),
        "another engine": at("engine", "name", value="onnxruntime"),
        "another target": at("target", value="onnxruntime"),
        "another width": at("shapes", "hidden", value=64),
        "more layers": at("shapes", "layers", value=3),
        "another vocabulary": at("shapes", "vocab", value=2),
        "a limit of positions": at("shapes", "max_positions", value=4),
        "another type": at("dtype", value="float16"),
        "more zeros": at("sparsity", "zeros", value=999),
        "another source": at("source", "sha256", value="cd" * 32),
        "a better check": at("check", "largest_difference", value=0.0),
        "no hash of a file": lambda values: values["files"].pop("config.json"),
        "a new key": at("comment", value="mine"),
        "a new inner key": at("shapes", "heads", value=8),
        "another hash": at("sha256", value="0" * 64),
        "no hash": at("sha256", value=None),
    }


@pytest.mark.parametrize("name", edits())
def test_an_edited_description(folder: Path, name: str) -> None:
    """Every command loads it here; what it says would decide what runs and what is reported."""
    path = folder / "artifact.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values, indent=None, sort_keys=True))  # its layout may change
    load_artifact(folder)
    edits()[name](values)
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"artifact\.json was edited or is damaged .* Export the checkpoint again"):
        load_artifact(folder)


def test_every_key_that_is_missing(folder: Path) -> None:
    """It is named where it is needed; where an earlier version did not write it, the hash tells."""
    path = folder / "artifact.json"
    sound = json.loads(path.read_text())
    optional = {"check", "quantization", "bytes_per_token", "self_test", "sparsedeploy"}
    for key in sound:
        path.write_text(json.dumps({name: value for name, value in sound.items() if name != key}))
        if key == "sha256":  # of an earlier version
            load_artifact(folder)
            continue
        with pytest.raises(UserError, match="was edited" if key in optional else f"lacks '{key}'"):
            load_artifact(folder)


def test_newer_format(folder: Path) -> None:
    edit(folder, format=2)
    with pytest.raises(UserError, match="format 2"):
        load_artifact(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "is a list"),
        ("null", "is null"),
        ("{}", "lacks 'format'"),
        ('{"format": 1}', "lacks 'target'"),
    ],
)
def test_broken_description(folder: Path, text: str, said: str) -> None:
    (folder / "artifact.json").write_text(text)
    with pytest.raises(UserError, match=f"artifact.json.*{said}"):
        load_artifact(folder)


def test_broken_shapes(folder: Path) -> None:
    edit(folder, shapes={"layers": 2})
    with pytest.raises(UserError, match=r"artifact\.json: shapes lacks 'kv_heads'"):
        load_artifact(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "link"])
def test_a_file_outside_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_text("x")
    (folder / "link").symlink_to(folder.parent / "outside")
    edit(folder, files={name: "0" * 64})
    with pytest.raises(UserError, match=r"inside its folder|link out of its folder"):
        load_artifact(folder)
