"""Waiting for other processes."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil


def wait_until(reached: Callable[[], bool]) -> None:
    """Wait; the limit only keeps a failing test from waiting for ever."""
    limit = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < limit
        time.sleep(0.05)


def has_ended(process: psutil.Process) -> bool:
    """Also true of a process that nobody has waited for yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
