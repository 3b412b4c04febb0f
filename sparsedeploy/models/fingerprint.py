"""Content hashes of a model folder: what makes a plan, a checkpoint and an artifact belong together."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sparsedeploy.errors import UserError
from sparsedeploy.models.weight_files import weight_files

_CHUNK = 1 << 20


def file_sha256(path: Path) -> str:
    """SHA-256 of one file, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def model_sha256(folder: Path) -> str:
    """SHA-256 over a model folder's ``config.json``, weight shards and adapter (names and contents), as hex.

    Raises:
        UserError: no config or no safetensors weights.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{folder} has no config.json", "Give a Hugging Face model folder or a hub id.")
    digest = hashlib.sha256()
    for path in [config, *weight_files(folder), *sorted(folder.glob("adapter/*"))]:
        digest.update(f"{path.relative_to(folder).as_posix()}:{file_sha256(path)}\n".encode())
    return digest.hexdigest()
