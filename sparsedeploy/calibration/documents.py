"""Text for calibration, training and evaluation: a file, a folder, a JSONL, a named set, or a ``datasets`` name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsedeploy.errors import UserError
from sparsedeploy.paths import expand
from sparsedeploy.reading import kind_of, open_regular, parse_json, parse_object, read_text

_FORMS = (
    "Give a text file, a folder of them, a .jsonl with a text field, stdlib, c4, or datasets:NAME[:CONFIG][:SPLIT]."
)
_ROW_FORMS = "Write one JSON object per line (in a .json file also a list of objects)."
_TEXT_LIMIT = 1 << 32
_CHUNK = 1 << 20
_SPLITS = ("train", "validation", "test")
_C4 = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}


def read_split(data: str, split: str) -> str:
    """The split of a text that is really read: c4 has no test split, its validation split stands in for it.

    Raises:
        UserError: another split than train, validation or test.
    """
    if split not in _SPLITS:
        raise UserError(f"unknown split '{split[:80]}'", f"Use one of {', '.join(_SPLITS)}.")
    return "validation" if data == "c4" and is_named(data) and split == "test" else split


def is_named(data: str) -> bool:
    """Whether a text is one of the named sets; a file or folder of that name comes before the set."""
    return (data in ("stdlib", "c4") or data.startswith("datasets:")) and not expand(data).exists()


def load_documents(data: str, *, field: str = "text", split: str = "train", flag: str = "--data-field") -> list[str]:
    """Read documents.

    Args:
        data: a path (``.txt`` or any text file is one document; ``.jsonl`` and ``.json`` have one per row; a folder has
            those of its files), ``stdlib`` (the running Python's own library), ``c4`` (one shard, through
            ``datasets``), or ``datasets:NAME[:CONFIG][:SPLIT]``.
        field: the text column of rows; a row with ``instruction`` and ``output`` instead is read as one text.
        split: which split of a named set: train, validation or test; see :func:`read_split`.
        flag: the option that names the column, for errors.

    Raises:
        UserError: nothing there, not text, no such field, no text in it, or an unknown split.
    """
    split = read_split(data, split)
    path = expand(data)
    if path.exists():
        documents = [text for file in _files(path) for text in _read_file(file, field, flag)]
    elif data == "stdlib":
        from sparsedeploy.reference.corpus import stdlib_documents

        documents = stdlib_documents(split)  # type: ignore[arg-type]
    elif data == "c4":
        documents = _load_dataset("allenai/c4", None, split, field, flag, data_files={split: _C4[split]})
    elif data.startswith("datasets:"):
        name, _, rest = data.removeprefix("datasets:").partition(":")
        config, _, named_split = rest.partition(":")
        documents = _load_dataset(name, config or None, named_split or split, field, flag)
    else:
        raise UserError(f"no text at '{data}'", _FORMS)
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise UserError(f"'{data}' holds no text", _FORMS)
    return documents


def content_sha256(data: str) -> str | None:
    """SHA-256 of the files that :func:`load_documents` reads, in their order; None for a named set.

    Raises:
        UserError: a file that cannot be read.
    """
    path = expand(data)
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for file in _files(path):
        with open_regular(file, fix=_FORMS) as opened:
            while chunk := opened.read(_CHUNK):
                digest.update(chunk)
        digest.update(f"\0{file.name}\0".encode())
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    """The file itself, or those of a folder."""
    if not path.is_dir():
        return [path]
    return [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]


def is_rows(data: str) -> bool:
    """Whether a text is a file of rows, each a unit of its own, and not running text."""
    path = expand(data)
    return path.is_file() and path.suffix in (".jsonl", ".json")


def _read_file(path: Path, field: str, flag: str) -> list[str]:
    if path.suffix not in (".jsonl", ".json"):
        return [read_text(path, limit=_TEXT_LIMIT, fix=_FORMS)]
    return [_text_of(row, field, where, flag) for row, where in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[Any, str]]:
    r"""The rows of a file and where each stands; lines end at ``\n`` only, whatever else separates lines elsewhere."""
    text = read_text(path, limit=_TEXT_LIMIT, fix=_ROW_FORMS)
    if path.suffix == ".json" and text.lstrip().startswith("["):
        for number, row in enumerate(parse_json(text, str(path), fix=_ROW_FORMS), 1):
            yield row, f"{path} row {number}"
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path} line {number}"
            yield parse_object(line, where, fix=_ROW_FORMS), where


def instruction_text(instruction: str, given: str, output: str) -> str:
    """One instruction row as text; the response is part of what is trained on."""
    parts = [f"### Instruction:\n{instruction}"]
    if given.strip():
        parts.append(f"### Input:\n{given}")
    parts.append(f"### Response:\n{output}")
    return "\n\n".join(parts)


def _text_of(row: Any, field: str, where: str, flag: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{where} is {kind_of(row)}, not a JSON object", _ROW_FORMS)
    if isinstance(row.get(field), str):
        return str(row[field])
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        return instruction_text(row["instruction"], str(row.get("input") or ""), row["output"])
    fix = f"Name the text field with {flag}."
    if field in row:
        raise UserError(f"{where}: '{field}' is {kind_of(row[field])}, not a string", f"Drop the row, or: {fix}")
    names = ", ".join(list(row)[:8]) or "no fields"
    raise UserError(f"{where} has neither '{field}' nor 'instruction' and 'output' (it has {names})", fix)


def _load_dataset(
    name: str, config: str | None, split: str, field: str, flag: str, data_files: dict[str, str] | None = None
) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"reading '{name}' needs the datasets package", "Install it: pip install 'sparsedeploy[data]'."
        ) from error
    try:
        rows = datasets.load_dataset(name, config, split=split, data_files=data_files)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"data set '{name}' could not be loaded ({type(error).__name__}: {reason})",
            "Check its name and the network, or give a text file.",
        ) from error
    return [_text_of(row, field, f"{name} row {number}", flag) for number, row in enumerate(rows)]
