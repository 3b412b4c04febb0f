"""Progress bars on standard error, for everything that takes longer than a second.

Library code calls :func:`bar` or :func:`track`; nothing shows until a program calls :func:`show` (the command line
does, unless ``--quiet``), so importing the package never prints.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
_visible = False


def show(visible: bool = True) -> None:
    """Turn progress bars and notes on or off for this process."""
    global _visible  # noqa: PLW0603 - one switch for the process, set once by the program
    _visible = visible


def note(text: str) -> None:
    """Print one line about what happens next, on standard error, when progress is shown."""
    if _visible:
        Console(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)


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
    console = Console(stderr=True)
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
