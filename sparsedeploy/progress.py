"""Progress bars on standard error, for everything that takes longer than a second.

Library code calls :func:`bar` or :func:`track`; nothing shows until a program calls :func:`show` (the command line
does, unless ``--quiet``), so importing the package never prints.
"""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

T = TypeVar("T")
_visible = False
_terminal: TextIO | None = None  # where bars and notes go; None for standard error
_begun = ""  # the last line of a log, where it says what begins
# Between two lines of a log, in seconds.
_LINE_SECONDS = 30.0
_WIDE = 100  # characters that a long bar needs beside its texts


# Cc: control characters; Cf: invisible ones, which can reverse the order of what is shown; Cs: half a surrogate; Zl and
# Zp: line breaks of their own.
_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str, keep: str = "\n\t") -> str:
    """The text with its control characters escaped, but for those to ``keep``: a string never steers a terminal."""
    if text.isprintable():
        return text
    return "".join(
        character
        if character in keep or unicodedata.category(character) not in _ESCAPED
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
    global _begun  # noqa: PLW0603 - standard error belongs to the process
    if _visible:
        _begun = ""
        SafeConsole(file=_stream(), highlight=False).print(text, soft_wrap=True, markup=False)


@contextmanager
def alone() -> Iterator[None]:
    """Drop what else is printed inside, by other libraries: bars and notes are shown all the same."""
    global _terminal  # noqa: PLW0603 - standard error belongs to the process
    before, _terminal = _terminal, _stream()
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        _terminal = before


def _stream() -> TextIO:
    return sys.stderr if _terminal is None else _terminal


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
def bar(description: str, total: int | None, unit: str = "", *, done: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar; yields ``advance(steps=1, status="")``.

    Where standard error is no terminal, plain lines instead: the description, once for the same work several times in
    a row, then one every half minute.

    Args:
        done: steps that an earlier run has made; they do not count for the time left.
    """
    global _begun  # noqa: PLW0603 - see note
    if not _visible:
        yield lambda steps=1, status="": None
        return
    console = SafeConsole(file=_stream(), highlight=False)
    if not console.is_terminal:
        if description != _begun:
            console.print(description, markup=False, soft_wrap=True)
        _begun = description
        yield _lines(console, description, total, unit, done)
        return
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=28 if console.width >= _WIDE else 10),
        MofNCompleteColumn(),
        TextColumn(f"{unit}{{task.fields[status]}}", markup=False, table_column=Column(no_wrap=True)),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=False) as progress:
        task = progress.add_task(description, total=total, completed=done, status="")

        def advance(steps: int = 1, status: str = "") -> None:
            progress.update(task, advance=steps, status=f" {status}" if status else "")

        yield advance


def _lines(console: Console, description: str, total: int | None, unit: str, done: int) -> Callable[..., None]:
    """What advances a bar in a log: prints how far the work is and how long it will still take."""
    started = printed = time.monotonic()
    reached = done

    def advance(steps: int = 1, status: str = "") -> None:
        nonlocal printed, reached
        reached += steps
        now = time.monotonic()
        if now - printed < _LINE_SECONDS or reached == total:
            return
        printed = now
        left = "" if total is None else f", {duration((total - reached) * (now - started) / (reached - done))} left"
        of_total = "" if total is None else f" of {total}"
        console.print(
            f"{description}: {reached}{of_total} {unit}".rstrip() + left + (f" ({status})" if status else ""),
            markup=False,
            soft_wrap=True,
        )

    return advance


def duration(seconds: float) -> str:
    """Such as ``45 s``, ``3 min 10 s`` or ``2 h 5 min``."""
    whole = max(0, round(seconds))
    minutes, hours = whole // 60, whole // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def track(items: Iterable[T], description: str, total: int | None = None, unit: str = "") -> Iterator[T]:
    """Iterate with a progress bar."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with bar(description, total, unit) as advance:
        for item in items:
            yield item
            advance()
