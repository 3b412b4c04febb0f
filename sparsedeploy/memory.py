"""Keep a long job's memory at what it uses."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Give what was freed back to the system (glibc; elsewhere nothing).

    glibc keeps freed blocks for itself, and a job that works on tensors of many sizes, layer after layer, grows by the
    holes between them.
    """
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
