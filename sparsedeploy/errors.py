"""The one exception that a user is meant to read."""

from __future__ import annotations

import re

# What libraries say on several lines is said on one; a value that is longer than any name is not repeated whole.
_LINES = re.compile(r"\s*\n\s*")
_ENDLESS = re.compile(r"\S{400,}")


class UserError(Exception):
    """Bad input or a missing prerequisite: one line that says what is wrong and, after it, what to do.

    The command line prints it as ``error: MESSAGE. FIX`` on one line and exits with code 2.
    """

    def __init__(self, message: str, fix: str) -> None:
        self.message = _one_line(message.rstrip("."))
        self.fix = _one_line(fix)
        super().__init__(f"{self.message}. {self.fix}")


def _one_line(text: str) -> str:
    return _ENDLESS.sub(lambda found: f"{found[0][:120]}...{found[0][-40:]}", _LINES.sub(" ", text))


def add_hint(error: BaseException, hint: str) -> None:
    """Give any exception a sentence about what is kept, which the command line prints after it."""
    error.hint = hint  # type: ignore[attr-defined]


def hint_of(error: BaseException) -> str:
    """The sentence of :func:`add_hint`, with a blank before it; empty when there is none."""
    hint = getattr(error, "hint", "")
    return f" {hint}" if hint else ""
