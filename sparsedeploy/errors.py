"""The one exception that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a missing prerequisite: one line that says what is wrong and, after it, what to do.

    The command line prints it as ``error: MESSAGE. FIX`` on one line and exits with code 2.
    """

    def __init__(self, message: str, fix: str | None = None) -> None:
        self.message = message.rstrip(".")
        self.fix = fix
        super().__init__(self.message if fix is None else f"{self.message}. {fix}")


def add_hint(error: BaseException, hint: str) -> None:
    """Give any exception a sentence about what is kept, which the command line prints after it."""
    error.hint = hint  # type: ignore[attr-defined]


def hint_of(error: BaseException) -> str:
    """The sentence of :func:`add_hint`, with a blank before it; empty when there is none."""
    hint = getattr(error, "hint", "")
    return f" {hint}" if hint else ""
