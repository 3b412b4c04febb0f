"""Pieces of Markdown for the generated pages."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
NOTE = "<!-- Written by docs/generate.py (make docs): change the code, not this page. -->\n\n"


def table(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    headers = list(headers)
    lines = [f"| {' | '.join(headers)} |", "|" + "---|" * len(headers)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(text: str | None) -> str:
    return " ".join(prose(text).split()).replace("|", "\\|")


def first_sentence(text: str | None) -> str:
    return cell(text).split(". ")[0].split(" (")[0].rstrip(".") + "."


def prose(text: str | None) -> str:
    """A docstring as Markdown, with code spans for roles."""
    text = inspect.cleandoc(text or "")
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")
