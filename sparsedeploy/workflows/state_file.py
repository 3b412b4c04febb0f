"""What a job keeps between its runs, as JSON with a hash: what was edited or damaged since is not resumed from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json
from sparsedeploy.reading import read_object, values_sha256

_HASH = "sha256"


def write_state(path: Path, values: Mapping[str, Any]) -> None:
    """Write a state so that the file is never half-written."""
    plain = json.loads(json.dumps(dict(values), allow_nan=False))
    write_json(path, {**plain, _HASH: values_sha256(plain)})


def read_state(path: Path, *, fix: str) -> dict[str, Any]:
    """The values that :func:`write_state` wrote.

    Raises:
        UserError: a file that cannot be read, or whose values are not those that were written.
    """
    values = read_object(path, fix=fix)
    if values.pop(_HASH, None) != values_sha256(values):
        raise UserError(f"{path} was edited or is damaged (its SHA-256 differs)", fix)
    return values
