"""Paths that a user names: what can be read, what can be written, and what must not be written over."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from sparsedeploy.errors import UserError
from sparsedeploy.progress import printable

# Files in the making have the output's name with something before and after it.
_LONGEST_NAME = 255 - 24
_LONGEST_PATH = 4096 - 512


def expand(path: str | Path) -> Path:
    """A path with the ``~`` or ``~user`` at its start replaced by the home folder.

    Raises:
        UserError: no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        name = str(path).split(os.sep, maxsplit=1)[0]
        raise UserError(f"there is no user {name[1:]!r} for the path {shown(path)}", f"Write ./{name}.") from None


def shown(path: str | Path) -> str:
    """A path for a message: on one line, printable, and not endless."""
    text = printable(os.fspath(path), keep="")
    return text if len(text) <= 200 else f"{text[:120]}...{text[-40:]}"


def check_regular(path: str | Path) -> None:
    """Refuse to read what has no end or blocks: pipes, sockets and devices. What is absent passes.

    Raises:
        UserError: neither a file nor a folder.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{shown(path)} is {_kind(mode)}, not a file or folder", "Copy its contents into a file first.")


def check_output(target: Path) -> None:
    """Refuse a place that cannot be written, before any work; nothing is created.

    Raises:
        UserError: a name that is too long, not UTF-8 or a link to nothing, a parent that is a file, or a folder that
            is not writable.
    """
    name = shown(target)
    try:
        length = len(str(target).encode())
    except UnicodeEncodeError:
        raise UserError(f"output {name} is not UTF-8", "Choose a name in UTF-8.") from None
    if "\0" in str(target):
        raise UserError(f"output {name} holds a zero byte", "Choose another name.")
    longest = max((len(part.encode()) for part in target.parts), default=0)
    if longest > _LONGEST_NAME or length > _LONGEST_PATH:
        which = f"a name of {longest}" if longest > _LONGEST_NAME else f"a path of {length}"
        raise UserError(
            f"output {name} has {which} bytes, which is too long",
            f"Use at most {_LONGEST_NAME} bytes in a name and {_LONGEST_PATH} in a path.",
        )
    try:
        mode = os.stat(target).st_mode if os.path.lexists(target) else None
    except OSError:
        raise UserError(f"output {name} is a symbolic link that leads nowhere", "Name another.") from None
    if mode is not None and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"output {name} is {_kind(mode)}", "Name a file or folder.")
    place = target.parent
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise UserError(f"cannot write {name}: {shown(place)} is not a folder", "Choose another place.")
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        reason = "is not writable" if isinstance(error, PermissionError) else f"takes no files ({error.strerror})"
        raise UserError(
            f"cannot write {name}: {shown(place)} {reason}", "Choose a folder that you may write to."
        ) from error


def check_file_output(path: Path, inputs: Iterable[str | Path] = ()) -> None:
    """:func:`check_output` for a single file: it may replace an older one of its kind, outside of what is read.

    Raises:
        UserError: a place that cannot be written, a folder, an input or a place in one, or an existing file of another
            kind.
    """
    check_output(path)
    if path.is_dir():
        raise UserError(f"output {shown(path)} is a folder", "Name a file.")
    check_apart(path, inputs)  # a new file too: the next run would read it
    if path.exists() and path.suffix.lower() not in (".json", ".csv", ".html", ".png", ".svg"):
        raise UserError(f"output {shown(path)} exists and is not a result file", "Choose another name.")


def check_outside(target: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse to write an input or into one; links and other names of a folder do not hide it.

    Args:
        target: what is written; it need not exist.
        inputs: paths that are read; names that are no path on this machine are passed over.

    Raises:
        UserError: such an output, naming the input.
    """
    place = Path(os.path.realpath(target))
    while not place.exists() and place != place.parent:
        place = place.parent
    here = _identities(place)
    for source in inputs:
        there = _identities(Path(source))
        if there and there[0] in here:
            word = "is" if there == _identities(target) else "lies in"
            raise UserError(
                f"output {shown(target)} {word} the input {shown(source)}", "Choose an output outside of the input."
            )


def check_apart(target: Path, inputs: Iterable[str | Path]) -> None:
    """:func:`check_outside`, and refuse to replace a folder that holds an input.

    Raises:
        UserError: such an output, naming the input.
    """
    inputs = list(inputs)
    check_outside(target, inputs)
    here = _identities(target)
    for source in inputs:
        if here and here[0] in _identities(Path(source)):
            raise UserError(f"output {shown(target)} holds the input {shown(source)}", "Choose another output.")


def _identities(path: Path) -> list[tuple[int, int]]:
    """(device, inode) of a path and of the folders above it; empty where there is no such path."""
    try:
        resolved = path.resolve(strict=True)
        found = [os.stat(place) for place in (resolved, *resolved.parents)]
    except (OSError, ValueError, RuntimeError):
        return []
    return [(entry.st_dev, entry.st_ino) for entry in found]


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(mode), "a special file")
