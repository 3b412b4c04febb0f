"""Output folders and files that appear whole or not at all, also when the process or the machine is stopped.

While an output is made, its hidden siblings are: ``.NAME.lock``, held by the one run that writes it; ``.NAME.partial``
or ``.NAME.recovery``, what an interrupted run resumes from; ``.NAME.*.tmp``, a folder in the making or one that is
being removed; and ``.NAME.*.old``, a replaced folder on systems that cannot swap two names in one step.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from sparsedeploy.errors import UserError
from sparsedeploy.paths import check_apart, check_output, check_outside, shown

JOURNAL = "journal.jsonl"
# A folder with one of these is ours: it may be replaced.
_OURS = ("sparsity.json", "artifact.json", "reference.json", "import.json", JOURNAL)
# What an interrupted run resumes from -> the file that makes it ours.
_INTERRUPTED = {"partial": JOURNAL, "recovery": "request.json"}
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class DiskError(UserError):
    """The disk is full or not writable: nothing is wrong with the request itself."""


def check_writable(target: Path, overwrite: bool, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse early, before any work, an output folder that cannot or must not be written.

    Args:
        overwrite: a folder that this program wrote may be replaced.
        inputs: what the run reads; it is never written into nor replaced, nor is a folder that holds it.

    Raises:
        UserError: a place that cannot be written, or a target that exists and may not be replaced.
    """
    check_output(target)
    check_outside(target, inputs)
    name = shown(target)
    if not target.exists():
        return
    if target.is_symlink():
        raise UserError(f"output {name} is a symbolic link", "Name the folder that it leads to.")
    if not target.is_dir():
        raise UserError(f"output {name} is a file", "Name a folder that does not exist yet.")
    here = target.resolve()
    if here in (Path.cwd().resolve(), *Path.cwd().resolve().parents, Path.home().resolve()):
        raise UserError(f"output {name} is or holds the working or home folder", "Name a new folder.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"output folder {name} exists", "Choose another, or pass --overwrite to replace it.")
    check_apart(target, inputs)
    if not any((target / mark).is_file() for mark in _OURS):
        raise UserError(
            f"output folder {name} holds files that sparsedeploy did not write", "Choose another, or empty it yourself."
        )


@contextmanager
def claim(
    target: Path, *, overwrite: bool = False, resume: bool = False, inputs: Iterable[str | Path] = ()
) -> Iterator[None]:
    """Keep an output folder for one run: checked before the work, locked during it, and cleared of what a kill left.

    The same thread may enter it again.

    Args:
        resume: what an interrupted run resumes from is wanted.
        inputs: what the run reads, see :func:`check_writable`.

    Raises:
        UserError: see :func:`check_writable`; also another run that writes the same output.
    """
    check_output(target)
    if not target.name:  # the working folder or the root, which have no sibling to lock
        check_writable(target, overwrite, inputs)
    with locked(target, inputs) as first:
        if first:
            _clear_up(target, resume)
        check_writable(target, overwrite, inputs)
        yield


@contextmanager
def locked(target: Path, inputs: Iterable[str | Path] = ()) -> Iterator[bool]:
    """Hold the lock of an output; missing parent folders are made, and removed again where nothing was written.

    Yields whether this thread did not hold it already.

    Args:
        inputs: what the run reads; nothing is written into it.

    Raises:
        UserError: another run holds it, the place is not writable, or it lies in an input.
    """
    check_outside(target, inputs)
    path = target.with_name(f".{target.name}.lock")
    made = [parent for parent in target.parents if not parent.exists()]
    lock = FileLock(path, is_singleton=True)
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            while not path.exists():  # the holder before us removed it after we had opened it
                lock.release()
                lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another run is writing {shown(target)}", "Wait until it has ended, or choose another output."
            ) from None
        except OSError as error:
            reason, fix = disk_error(error) or (error.strerror or str(error), "Choose another place.")
            raise DiskError(f"cannot write {shown(target)}: {reason}", fix) from error
        try:
            yield lock.lock_counter == 1
        finally:
            if lock.lock_counter == 1:
                path.unlink(missing_ok=True)
            lock.release()
    finally:
        for folder in made:
            with suppress(OSError):  # it holds the result
                folder.rmdir()


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling to fill; on success it is synced and renamed to ``target``, else removed.

    Raises:
        UserError: the target exists (without ``overwrite``), the disk is full, or the place is not writable.
    """
    target = Path(target)
    with claim(target, overwrite=overwrite):
        staging = None
        try:
            staging = _sibling(target, ".tmp")
            yield staging
            publish(staging, target)
        except BaseException as error:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
            if (found := as_disk_error(error, target)) is not None:
                raise found from error
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
    """Make a finished folder safe on disk and give it its name; what stood there takes its own and is removed."""
    _sync_tree(staging)
    if not target.exists():
        os.rename(staging, target)
        sync(target.parent)
        return
    if _exchange(staging, target):
        sync(target.parent)
        discard(staging, target)
        return
    # A kill between these renames is put right by the next run on this output: see _clear_up.
    old = _sibling(target, ".old")
    os.rename(target, old / target.name)
    try:
        os.rename(staging, target)
    except BaseException:
        os.rename(old / target.name, target)
        old.rmdir()
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def discard(folder: Path, target: Path) -> None:
    """Remove a hidden sibling of an output so that a kill never leaves a part of it under its name."""
    if not folder.exists():
        return
    with suppress(OSError):  # such as a full disk
        place = _sibling(target, ".tmp")
        os.rename(folder, place / "discarded")
        folder = place
    shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Make a file's contents, or the names in a folder, safe against a crash of the machine."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync folders
            raise
    finally:
        os.close(handle)


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
    made = [parent for parent in path.parents if not parent.exists()]
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path = Path(os.path.realpath(path))
        _sweep(path)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.{os.getpid()}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        if (found := as_disk_error(error, path)) is not None:
            raise found from error
        raise


def _sweep(path: Path) -> None:
    """Remove the temporary siblings of a file whose processes, killed while they wrote, are gone from this machine."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.*.tmp"):
        process = left.name.removeprefix(f".{path.name}.").partition(".")[0]
        if left.is_file() and process.isdigit() and not psutil.pid_exists(int(process)):
            left.unlink(missing_ok=True)


def as_disk_error(error: BaseException, target: Path) -> DiskError | None:
    """The error as one that names the place, when it is the disk's."""
    if isinstance(error, DiskError) or (reason := disk_error(error)) is None:
        return None
    return DiskError(f"cannot write {shown(target)}: {reason[0]}", reason[1])


def disk_error(error: BaseException) -> tuple[str, str] | None:
    """(reason, fix) when the error is the disk's. Native writers report it only in their message's text."""
    number = error.errno if isinstance(error, OSError) else None
    text = str(error) if not isinstance(error, UserError) else ""
    if number == errno.ENOSPC or "No space left on device" in text or "os error 28" in text:
        return "the disk is full", "Free some space or choose another place, then run the command again."
    if number == errno.EDQUOT or "os error 122" in text:
        return "the disk quota is used up", "Free some space or choose another place."
    if number == errno.EFBIG or "File too large" in text or "os error 27" in text:
        return "a file would exceed the size limit", "Raise it (ulimit -f unlimited) or choose another file system."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        name = getattr(error, "filename", None)
        place = f"{shown(name)} is not accessible" if isinstance(name, str) else "the place is not writable"
        return place, "Choose a folder that you may write to."
    return None


def _sibling(target: Path, suffix: str) -> Path:
    """A new hidden folder beside an output, with the rights that a new folder has."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=suffix, dir=target.parent))
    folder.chmod(0o777 & ~_umask())
    return folder


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def partial(target: Path) -> Path:
    """The folder in the making that an interrupted run leaves, and resumes from."""
    return target.with_name(f".{target.name}.partial")


def _clear_up(target: Path, resume: bool) -> None:
    """Finish or undo what a killed run left beside an output whose lock we hold.

    Raises:
        UserError: something that is not ours has the name of what an interrupted run resumes from.
    """
    for entry in sorted(target.parent.iterdir()):
        middle = entry.name.removeprefix(f".{target.name}.")
        if middle == entry.name or entry.is_symlink() or not entry.is_dir():
            continue
        if middle.endswith(".old") and middle.count(".") == 1:
            if (entry / target.name).is_dir() and not target.exists():
                os.rename(entry / target.name, target)
            shutil.rmtree(entry, ignore_errors=True)
        elif middle.endswith(".tmp") and middle.count(".") == 1:
            shutil.rmtree(entry, ignore_errors=True)
    if (target / JOURNAL).is_file():
        # A run was killed after its folder had got its name. To resume it is to finish it once more.
        if not resume:
            if partial(target).is_dir() and not (partial(target) / JOURNAL).is_file():
                discard(partial(target), target)  # what it replaced
            (target / JOURNAL).unlink()
        elif not partial(target).exists():
            os.rename(target, partial(target))
        else:
            _exchange(target, partial(target))
    for suffix, mark in _INTERRUPTED.items():
        place = target.with_name(f".{target.name}.{suffix}")
        if not os.path.lexists(place):
            continue
        if place.is_symlink() or not place.is_dir() or (any(place.iterdir()) and not (place / mark).is_file()):
            raise UserError(
                f"{shown(place)} is in the way and is not an interrupted run", "Remove it, or choose another output."
            )


def _exchange(one: Path, two: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE) == 0)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)
