"""Text that every Python installation carries: the sources and docstrings of its standard library.

The text differs between Python versions and distributors, so whatever is made from it is keyed by
:func:`fingerprint`, never by the version's number.
"""

from __future__ import annotations

import functools
import hashlib
import sysconfig
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sparsedeploy.errors import UserError

Split = Literal["train", "validation", "test"]

# Tests, applications, bundled third-party code and code tables: absent from some distributions, or not text worth
# learning (the codec tables in ``encodings`` are generated, and nearly equal to each other).
_SKIPPED_FOLDERS = {
    "__pycache__",
    "_bundled",
    "dist-packages",
    "encodings",
    "idlelib",
    "idle_test",
    "lib2to3",
    "msilib",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
# What the installer or the administrator wrote for one machine.
_SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize", "config-")
# Chosen once so that the held-out splits are about equally large and no single file dominates one of them.
_SPLIT_SALT = 4242
_MIN_CHARACTERS = 256
_MIN_TOTAL_CHARACTERS = 2_000_000


@dataclass(frozen=True)
class Document:
    """One source file: its path relative to the standard library, its split and its text."""

    path: str
    split: Split
    text: str


def read_corpus(root: Path | None = None) -> list[Document]:
    """Read the Python files under ``root``, in path order, each assigned to a split by the hash of its path.

    About 90 / 5 / 5 % of the files are for training / validation / test. Newlines become ``\\n``; files with equal text
    are kept once, so that no text is in two splits.

    Args:
        root: a folder of Python sources; the running interpreter's standard library when left out.

    Raises:
        UserError: the standard library is not there as source files.
    """
    if root is None:
        return list(_stdlib())
    return _read(root)


@functools.cache
def _stdlib() -> tuple[Document, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = _read(root) if root.is_dir() else []
    if sum(len(document.text) for document in documents) < _MIN_TOTAL_CHARACTERS:
        raise UserError(
            f"the standard library's sources are not under {root}",
            "Use a Python that has them (not an embedded or stripped build), or name your own --data file.",
        )
    return tuple(documents)


def _read(root: Path) -> list[Document]:
    documents: list[Document] = []
    seen: set[str] = set()
    relative_paths = (path.relative_to(root) for path in root.rglob("*.py"))
    for relative in sorted((path for path in relative_paths if _wanted(path)), key=lambda path: path.as_posix()):
        text = _read_source(root / relative)
        if len(text) < _MIN_CHARACTERS or text in seen:
            continue
        seen.add(text)
        name = relative.as_posix()
        documents.append(Document(name, split_of(name), text))
    return documents


def _wanted(relative: Path) -> bool:
    return not any(part in _SKIPPED_FOLDERS or part.startswith(_SKIPPED_PREFIXES) for part in relative.parts)


def _read_source(path: Path) -> str:
    """The file's text by the encoding that it declares; empty when it cannot be read."""
    try:
        with tokenize.open(path) as file:  # opens with universal newlines
            return file.read().strip("\n") + "\n"
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""


def split_of(path: str) -> Split:
    """The split of a relative path, by its hash: it stays the same whatever other files there are."""
    percentile = int.from_bytes(hashlib.sha256(f"{_SPLIT_SALT}:{path}".encode()).digest()[:8], "big") % 100
    if percentile < 5:
        return "validation"
    return "test" if percentile < 10 else "train"


def fingerprint(documents: Iterable[Document]) -> str:
    """SHA-256 over the documents' paths, splits and texts, as hex."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.path, document.split, document.text):
            encoded = part.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()


def texts_of(documents: Iterable[Document], split: Split) -> list[str]:
    """The texts of one split, in path order."""
    return [document.text for document in documents if document.split == split]


def stdlib_documents(split: Split) -> list[str]:
    """The running Python's standard library as a data source: the texts of one split.

    Calibrate on ``train``, measure on ``validation`` or ``test``.

    Raises:
        UserError: an unknown split, or the sources are not installed.
    """
    if split not in get_args(Split):
        raise UserError(f"the standard library has no split '{split}'", f"Use {', '.join(get_args(Split))}.")
    return texts_of(_stdlib(), split)
