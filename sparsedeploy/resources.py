"""Find what is shipped beside the package: in the wheel under ``_shipped``, in a checkout beside the package."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile

from sparsedeploy.errors import UserError
from sparsedeploy.paths import expand, shown

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
        return expand(override).resolve()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("sparsedeploy", appauthor=False))


def cache_folder(*names: str) -> Path:
    """A folder below :func:`cache_home`, made where it is missing.

    Raises:
        UserError: it is a file or cannot be made.
    """
    folder = cache_home().joinpath(*names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"cannot write {shown(folder)}: {error.strerror}",
            "Set SPARSEDEPLOY_HOME to a folder that you may write to.",
        ) from error
    return folder
