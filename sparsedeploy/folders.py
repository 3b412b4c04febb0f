"""Output folders and files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsedeploy.errors import UserError


class DiskError(UserError):
    """The disk is full or not writable: nothing is wrong with the request itself."""


def check_writable(target: Path, overwrite: bool) -> None:
    """Refuse early, before any work, an output folder that exists.

    Raises:
        UserError: the target exists and ``overwrite`` is off, or is a file, or is the working folder.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"output {target} is a file", "Name a folder that does not exist yet.")
    if target.resolve() in (Path.cwd().resolve(), Path.home().resolve()):
        raise UserError(f"output {target} is the working or home folder", "Name a new folder.")
    if any(target.iterdir()) and not overwrite:
        raise UserError(f"output folder {target} exists", "Choose another, or pass --overwrite to replace it.")


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling to fill; on success it is synced and renamed to ``target``, else removed.

    Raises:
        UserError: the target exists (without ``overwrite``), the disk is full, or the place is not writable.
    """
    target = Path(target)
    check_writable(target, overwrite)
    staging = _new_sibling(target)
    try:
        yield staging
        publish(staging, target)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        reason = disk_error(error)
        if reason is not None:
            raise DiskError(f"cannot write {target}: {reason[0]}", reason[1]) from error
        raise


def check_free_space(folder: Path, needed: int) -> None:
    """Refuse early what will not fit.

    Raises:
        UserError: less than ``needed`` bytes are free where ``folder`` is.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the disk is too full: {folder.parent} has {free / 1e6:,.1f} MB free, {needed / 1e6:,.1f} MB are needed",
            "Free some space or choose another place, then run the command again.",
        )


def publish(staging: Path, target: Path) -> None:
    """Make a finished folder safe on disk and give it its name, in place of what was there."""
    _sync_tree(staging)
    _replace(staging, target)


def write_json(path: Path, value: Any) -> None:
    """Write JSON (NaN refused, keys in the given order) so that the file is never half-written."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file; see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file through a temporary sibling and a rename.

    Raises:
        UserError: the disk is full or the place is not writable.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = disk_error(error)
        if reason is None:
            raise
        raise DiskError(f"cannot write {path}: {reason[0]}", reason[1]) from error


def _new_sibling(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        umask = os.umask(0)
        os.umask(umask)
        staging.chmod(0o777 & ~umask)
    except OSError as error:
        reason, fix = disk_error(error) or (error.strerror or str(error), "Choose a folder that you may write to.")
        raise UserError(f"cannot write {target}: {reason}", fix) from error
    return staging


def _replace(staging: Path, target: Path) -> None:
    if not target.exists():
        os.rename(staging, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    os.rename(target, old / "replaced")
    try:
        os.rename(staging, target)
    except BaseException:
        os.rename(old / "replaced", target)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def disk_error(error: BaseException) -> tuple[str, str] | None:
    """(reason, fix) when the error is the disk's. Native writers report a full disk only in their message's text."""
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if number == errno.ENOSPC or "No space left on device" in text or "os error 28" in text:
        return "the disk is full", "Free some space or choose another place, then run the command again."
    if number == errno.EDQUOT:
        return "the disk quota is used up", "Free some space or choose another place."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "the place is not writable", "Choose a folder that you may write to."
    return None
