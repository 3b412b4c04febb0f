"""Find what is shipped beside the package: in the wheel under ``_shipped``, in a checkout beside the package."""

from __future__ import annotations

import os
from pathlib import Path

from sparsedeploy.errors import UserError

_PACKAGE = Path(__file__).resolve().parent


def shipped(name: str) -> Path:
    """The folder of that name (such as ``export``), wherever this installation keeps it.

    Raises:
        UserError: the installation lacks it.
    """
    for folder in (_PACKAGE / "_shipped" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise UserError(f"this installation lacks its '{name}' folder", "Reinstall sparsedeploy.")


def cache_home() -> Path:
    """Where reference models and runtime environments are kept: ``SPARSEDEPLOY_HOME`` or the user's cache folder."""
    override = os.environ.get("SPARSEDEPLOY_HOME")
    if override:
        return Path(override).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "sparsedeploy"
