"""Text for calibration and evaluation: a file, a folder, a JSONL, a named set, or a ``datasets`` name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsedeploy.errors import UserError

_FORMS = (
    "Give a text file, a folder of them, a .jsonl with a text field, stdlib, c4, or datasets:NAME[:CONFIG][:SPLIT]."
)
_C4 = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}


def load_documents(data: str, *, field: str = "text", split: str = "train") -> list[str]:
    """Read documents.

    Args:
        data: a path (``.txt`` or any text file is one document; ``.jsonl`` one per line; a folder one per file),
            ``stdlib`` (the running Python's own library), ``c4`` (first shard, through ``datasets``), or
            ``datasets:NAME[:CONFIG][:SPLIT]``.
        field: the text column of JSONL rows and data sets.
        split: which split of a named set: train, validation or test.

    Raises:
        UserError: nothing there, not text, no such field, or no text in it.
    """
    path = Path(data).expanduser()
    if path.is_file():
        documents = _read_jsonl(path, field) if path.suffix in (".jsonl", ".json") else [_read_text(path)]
    elif path.is_dir():
        documents = [
            text
            for file in sorted(path.rglob("*"))
            if file.is_file() and not file.name.startswith(".")
            for text in (_read_jsonl(file, field) if file.suffix == ".jsonl" else [_read_text(file)])
        ]
    elif data == "stdlib":
        from sparsedeploy.reference.corpus import stdlib_documents

        documents = stdlib_documents(split)  # type: ignore[arg-type]
    elif data == "c4":
        documents = _load_dataset("allenai/c4", None, split, field, data_files={split: _C4.get(split, _C4["train"])})
    elif data.startswith("datasets:"):
        name, _, rest = data.removeprefix("datasets:").partition(":")
        config, _, named_split = rest.partition(":")
        documents = _load_dataset(name, config or None, named_split or split, field)
    else:
        raise UserError(f"no calibration text at '{data}'", _FORMS)
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise UserError(f"'{data}' holds no text", _FORMS)
    return documents


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text", _FORMS) from error


def _read_jsonl(path: Path, field: str) -> list[str]:
    documents = []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number} is not JSON ({error})", "Write one JSON object per line.") from error
        documents.append(_text_of(row, field, f"{path} line {number}"))
    return documents


def _text_of(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        names = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where} has no text field '{field}' (it has {names})", "Name the field with --data-field.")
    return str(row[field])


def _load_dataset(
    name: str, config: str | None, split: str, field: str, data_files: dict[str, str] | None = None
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
    return [_text_of(row, field, f"{name} row {number}") for number, row in enumerate(rows)]
