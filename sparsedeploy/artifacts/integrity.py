"""An exported folder holds the files of its export: their hashes are compared at its first load on a machine.

What was found is remembered in the cache folder with the size and the times of each file, and later loads only ask for
those. So a damaged file is told from an engine that computes wrongly, which
:mod:`sparsedeploy.runtimes.self_test` finds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json
from sparsedeploy.models.fingerprint import file_sha256
from sparsedeploy.reading import contained
from sparsedeploy.resources import cache_home

# Bytes that take several seconds to read.
_LARGE = 4e9
_FIX = "Copy the folder again, or export the checkpoint again with sparsedeploy export."


def verify_files(folder: Path, files: Mapping[str, str], listing: Path, *, again: bool = False) -> None:
    """Make sure that the files of an exported folder are there and have the SHA-256 that is written down.

    Reading them takes about a second for each gigabyte, once: files whose size and times have stayed the same since
    they were compared are not read again.

    Args:
        files: name -> SHA-256, as hex.
        listing: where they are written down, for errors.
        again: read every file in any case.

    Raises:
        UserError: a file is missing, lies outside the folder or has another hash.
    """
    paths = {name: contained(folder, name, str(listing)) for name in files}
    for name, path in paths.items():
        if not path.is_file():
            raise UserError(f"artifact {folder} lacks its file {name}", _FIX)
    # Before anything is read: a file that changes meanwhile is read again next time.
    states = {name: [files[name], *_state(path)] for name, path in paths.items()}
    key = str(folder.resolve())
    known = recall("verified", key) or {}
    unknown = [name for name in files if again or known.get(name) != states[name]]
    size = sum(paths[name].stat().st_size for name in unknown)
    if size > _LARGE:
        progress.note(f"compare {size / 1e9:.0f} GB of {folder} with their hashes")
    for name in unknown:
        if file_sha256(paths[name]) != files[name]:
            raise UserError(f"{paths[name]} was changed since the export or is damaged (its SHA-256 differs)", _FIX)
    if unknown:
        remember("verified", key, states)


def recall(kind: str, key: str) -> dict[str, Any] | None:
    """What :func:`remember` has kept; None where there is nothing, or nothing sound."""
    try:
        found = json.loads(_place(kind, key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def remember(kind: str, key: str, value: Mapping[str, Any]) -> None:
    """Keep a finding in the folder ``kind`` of the cache; a cache that cannot be written only costs time."""
    try:
        write_json(_place(kind, key), value)
    except (OSError, UserError) as error:
        progress.note(f"what was found is not kept for the next time: {error}")


def _place(kind: str, key: str) -> Path:
    return cache_home() / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _state(path: Path) -> tuple[int, int, int]:
    """Size in bytes and, in nanoseconds, the times of the last change of contents and of the file's entry."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns
