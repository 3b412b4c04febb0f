"""What a job keeps between its runs, as JSON with a hash: what was edited or damaged since is not resumed from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsedeploy.folders import write_json
from sparsedeploy.reading import hashed, read_object, take_hash


def write_state(path: Path, values: Mapping[str, Any]) -> None:
    """Write a state so that the file is never half-written."""
    plain = json.loads(json.dumps(dict(values), allow_nan=False))
    write_json(path, hashed(plain))


def read_state(path: Path, *, fix: str) -> dict[str, Any]:
    """The values that :func:`write_state` wrote.

    Raises:
        UserError: a file that cannot be read, or whose values are not those that were written.
    """
    values = read_object(path, fix=fix)
    take_hash(values, path, fix=fix)
    return values
