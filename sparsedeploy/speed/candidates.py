"""What takes part in a benchmark: folders, each on a runtime."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsedeploy import progress
from sparsedeploy.artifacts.description import ARTIFACT_FILE, Artifact
from sparsedeploy.artifacts.folder import describe_folder
from sparsedeploy.errors import UserError
from sparsedeploy.models.fingerprint import file_sha256
from sparsedeploy.paths import expand
from sparsedeploy.runtimes.engine import runtime_for
from sparsedeploy.runtimes.specification import Runtime
from sparsedeploy.speed.byte_limit import bytes_per_token

_RUNTIME = re.compile(r"([a-z0-9_-]+)=(.+)")


@dataclass(frozen=True)
class Candidate:
    """A folder on a runtime.

    Attributes:
        name: tells it from the others.
        sha256: of its ``artifact.json``, which holds the hashes of all its files; of a plain checkpoint, its own.
        bytes: of all its files.
    """

    name: str
    runtime: Runtime
    folder: Path
    artifact: Artifact
    sha256: str
    bytes: int


def load_contenders(artifacts: Sequence[str | Path], baseline: str | Path, runtime: str | None) -> list[Candidate]:
    """The baseline and the artifacts, their files verified and their runtimes found.

    Args:
        artifacts: folders, or ``RUNTIME=FOLDER``.
        runtime: of those that name none; by default the one that runs the folder's export target.

    Raises:
        UserError: nothing to compare, one given twice, an artifact without a count of its bytes, models of different
            shapes, or a runtime that does not run the folder.
    """
    if not artifacts:
        raise UserError("there is nothing to compare with the baseline", "Name at least one other artifact.")
    asked = [_split(one, runtime) for one in (baseline, *artifacts)]
    resolved = [(name, folder.resolve()) for name, folder in asked]
    for at, (_, folder) in enumerate(asked):
        if resolved[at] in resolved[:at]:
            raise UserError(f"{folder} is given twice", "Name the baseline and each artifact once.")
    described = [describe_folder(folder, verify=True) for _, folder in progress.track(asked, "verify the artifacts")]
    for (_, folder), artifact in zip(asked, described, strict=True):
        bytes_per_token(artifact)
        if _shape(artifact) != _shape(described[0]):
            raise UserError(
                f"{folder} and the baseline {asked[0][1]} are models of different shapes",
                "Compare exports of the same model, dense and pruned.",
            )
    runtimes = [runtime_for(artifact, folder, name) for (name, folder), artifact in zip(asked, described, strict=True)]
    found = [(one.name, folder.resolve()) for one, (_, folder) in zip(runtimes, asked, strict=True)]
    repeated = [folder for at, (_, folder) in enumerate(asked) if found[at] in found[:at]]
    if repeated:
        raise UserError(f"{repeated[0]} is given twice", "Name the baseline and each artifact once.")
    names = _names([folder for _, folder in asked], runtimes)
    return [
        Candidate(name, one, folder, artifact, _sha256(folder, artifact), _size(folder))
        for name, one, (_, folder), artifact in zip(names, runtimes, asked, described, strict=True)
    ]


def _split(given: str | Path, runtime: str | None) -> tuple[str | None, Path]:
    """The runtime (None where none is named) and the folder."""
    match = _RUNTIME.fullmatch(str(given))
    if match is None or Path(given).exists():
        return runtime, Path(given)
    return match[1], expand(match[2])


def _shape(artifact: Artifact) -> tuple[Any, ...]:
    return (artifact.model_type, artifact.shapes, artifact.sparsity.weights)


def _names(folders: Sequence[Path], runtimes: Sequence[Runtime]) -> list[str]:
    """The folders' own names where they differ, else with the runtime, else the folders as given."""
    names = [folder.resolve().name for folder in folders]
    count = Counter(names)
    names = [
        name if count[name] == 1 else f"{name}@{runtime.name}" for name, runtime in zip(names, runtimes, strict=True)
    ]
    if len(set(names)) == len(names):
        return names
    return [f"{folder}@{runtime.name}" for folder, runtime in zip(folders, runtimes, strict=True)]


def _sha256(folder: Path, artifact: Artifact) -> str:
    description = folder / ARTIFACT_FILE
    return file_sha256(description) if description.is_file() else artifact.source.sha256


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
