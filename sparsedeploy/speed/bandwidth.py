"""Memory bandwidth of this machine, measured with a given number of threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from sparsedeploy import progress
from sparsedeploy.machine import this_machine

_REPEATS = 9
# Where caches are large, passes take long: after so many seconds the fewest are enough.
_SECONDS, _FEWEST = 1.0, 3
_CACHE_MULTIPLE = 4  # STREAM's rule for each array (J. McCalpin, "STREAM: sustainable memory bandwidth")
_SMALLEST = 256 << 20
_DEFAULT_CACHE = 32 << 20


@dataclass(frozen=True)
class Bandwidth:
    """Measured memory traffic, in GB/s (10^9 bytes).

    Attributes:
        threads: how many worked at once.
        array_bytes: size of the array, far more than the caches hold.
        read: of every repeat, the bytes of one pass over the array that takes its maximum.
        copy: of every repeat, bytes read and bytes written of one copy. What the processor reads besides, to fill
            the cache lines that it writes, is not counted.
    """

    threads: int
    array_bytes: int
    read: list[float]
    copy: list[float]

    @property
    def best(self) -> float:
        """The highest figure of all repeats: other processes can only lower it."""
        return max(*self.read, *self.copy)


@lru_cache
def machine_bandwidth(threads: int) -> Bandwidth:
    """:func:`measure_bandwidth`, once in a process: it takes seconds, and the machine stays the same."""
    progress.note(f"measure memory bandwidth with {threads} thread{'s' if threads > 1 else ''}")
    return measure_bandwidth(threads)


def measure_bandwidth(threads: int, array_bytes: int | None = None, repeats: int = _REPEATS) -> Bandwidth:
    """Time passes over an array with ``threads`` threads, each on its own part.

    Args:
        array_bytes: by default 4 times the last-level cache, at least 256 MiB.
        repeats: at most; a second is enough for each kind of pass.
    """
    size = array_bytes or max(_SMALLEST, _CACHE_MULTIPLE * (this_machine().last_level_cache_bytes or _DEFAULT_CACHE))
    source = np.ones(size // 4, dtype=np.float32)
    target = np.empty_like(source)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))

    # numpy lets other threads run during both.
    def read(part: tuple[np.ndarray, np.ndarray]) -> None:
        part[0].max()

    def copy(part: tuple[np.ndarray, np.ndarray]) -> None:
        np.copyto(part[1], part[0])

    with ThreadPoolExecutor(threads) as pool:

        def rates(work: Callable[[tuple[np.ndarray, np.ndarray]], Any], traffic: int) -> list[float]:
            list(pool.map(work, parts))  # starts the threads, and the system hands out the memory
            found: list[float] = []
            began = time.perf_counter()
            while len(found) < repeats and (len(found) < _FEWEST or time.perf_counter() - began < _SECONDS):
                started = time.perf_counter()
                list(pool.map(work, parts))
                found.append(traffic / (time.perf_counter() - started) / 1e9)
            return found

        return Bandwidth(threads, source.nbytes, rates(read, source.nbytes), rates(copy, 2 * source.nbytes))
