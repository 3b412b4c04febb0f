"""Progress bars on standard error, for everything that takes longer than a second.

Library code calls :func:`bar` or :func:`track`; nothing shows until a program calls :func:`show` (the command line
does, unless ``--quiet``), so importing the package never prints.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")
_visible = False


def printable(text: str) -> str:
    """The text with its control characters escaped, newline and tab aside: a file's strings never steer a terminal."""
    if text.isprintable():
        return text
    # Cc: control characters; Cf: invisible ones, which can reverse the order of what is shown; Cs: half a surrogate.
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs")
        else character.encode("unicode_escape").decode()
        for character in text
    )


class SafeConsole(Console):
    """A console that prints every plain string through :func:`printable`, also those in tables."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def show(visible: bool = True) -> None:
    """Turn progress bars and notes on or off for this process."""
    global _visible  # noqa: PLW0603 - one switch for the process, set once by the program
    _visible = visible


def note(text: str) -> None:
    """Print one line about what happens next, on standard error, when progress is shown."""
    if _visible:
        SafeConsole(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)


@contextmanager
def hidden() -> Iterator[None]:
    """No bars or notes inside: for steps that are part of a larger one with a bar of its own."""
    before = _visible
    show(False)
    try:
        yield
    finally:
        show(before)


@contextmanager
def bar(description: str, total: int | None, unit: str = "") -> Iterator[Callable[..., None]]:
    """A progress bar; yields ``advance(steps=1, status="")``."""
    if not _visible:
        yield lambda steps=1, status="": None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn(f"{unit}{{task.fields[status]}}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = SafeConsole(stderr=True)
    with Progress(*columns, console=console, transient=False, disable=not sys.stderr.isatty()) as progress:
        if not sys.stderr.isatty():
            console.print(description, markup=False, highlight=False)
        task = progress.add_task(description, total=total, status="")

        def advance(steps: int = 1, status: str = "") -> None:
            progress.update(task, advance=steps, status=f" {status}" if status else "")

        yield advance


def track(items: Iterable[T], description: str, total: int | None = None, unit: str = "") -> Iterator[T]:
    """Iterate with a progress bar."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with bar(description, total, unit) as advance:
        for item in items:
            yield item
            advance()
