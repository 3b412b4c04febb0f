"""The process of a command: signals that end it, and streams whose reader may go away."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

from sparsedeploy.errors import UserError

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# Launchers send several signals in a row; only the first ends the command, while it cleans up.
_GRACE = 5.0


class Stop(BaseException):
    """A signal ends the command; every ``finally`` on the way out leaves things in order.

    Attributes:
        number: of the signal; the exit code is 128 more.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP end what runs inside as Ctrl-C does; what is ignored already (nohup) stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first: list[float] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if first and time.monotonic() - first[0] < _GRACE:
            return
        first[:] = [time.monotonic()]
        raise Stop(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def patient_streams() -> Iterator[None]:
    """Standard output and error that take any character, and stay usable when their reader goes away."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _patient(sys.stdout, 1), _patient(sys.stderr, 2)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def no_foreign_messages(enabled: bool = True) -> Iterator[None]:
    """Keep warnings of libraries off standard error: what a user must know, the commands say themselves."""
    if not enabled:
        yield
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.showwarning = lambda *arguments, **more: None
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


class _Patient:
    """A text stream that drops what it cannot deliver, once its reader is gone or its place is full."""

    def __init__(self, stream: TextIO, strict: bool) -> None:
        self._stream = stream
        self._strict = strict

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if self._strict and not isinstance(error, BrokenPipeError):
            raise UserError(
                f"cannot write to standard output: {error.strerror}", "The files that the command wrote are complete."
            ) from error


def _patient(stream: TextIO | None, number: int) -> Any:
    if stream is None:  # it was closed by whoever started us
        return open(os.devnull, "w", encoding="utf-8")
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return _Patient(stream, strict=number == 1)
