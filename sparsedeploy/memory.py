"""Keep a long job's memory at what it uses."""

from __future__ import annotations

import ctypes
import os
import sys


def use_huge_pages() -> None:
    """Have torch ask for huge pages (Linux; elsewhere nothing), unless the environment says otherwise.

    A job that goes through one large tensor after the other spends up to a third of its time on page faults of 4 KB.
    Of use before the process's first large tensor only.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


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
