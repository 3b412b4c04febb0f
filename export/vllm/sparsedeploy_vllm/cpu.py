"""The packed product on CPUs: a small C++ library, called through ctypes, and what it takes to have one.

The library has a plain C interface, so one binary serves every Python and torch. A wheel that was built where a
compiler was at hand brings one for each instruction set; else the first use compiles the one that this processor needs
(a few seconds, kept under sparsedeploy's cache folder); without a compiler, torch unpacks the weight block by block.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from sparsedeploy.formats import bitmask
from sparsedeploy.formats.bitmask import BitmaskWeight
from sparsedeploy.resources import cache_home
from sparsedeploy_vllm.compilation import FLAGS, LEVELS, SOURCE, Level, compile_library

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).resolve().parent
PREBUILT = _FOLDER / "prebuilt"
_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# Bytes of dense weight that are unpacked at a time: small enough to stay in the last cache until they are multiplied.
_TILE_BYTES = 8 << 20


class Library:
    """The compiled functions for one level."""

    def __init__(self, path: Path, level: Level) -> None:
        self.level = level
        library = ctypes.CDLL(str(path))
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        weight: tuple[Any, ...] = (pointer, pointer, pointer, size, size, size)
        self._linear = library.sparsedeploy_linear
        self._linear.argtypes = (number, pointer, size, size, *weight, pointer, pointer, size, number)
        self._unpack = library.sparsedeploy_unpack
        self._unpack.argtypes = (number, *weight, pointer, number)

    def linear(self, x: torch.Tensor, weight: BitmaskWeight, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [batch, columns]`` times the packed weight: ``[batch, rows]``, summed in float32."""
        x = x if x.stride(1) == 1 else x.contiguous()
        out = torch.empty(x.shape[0], weight.rows, dtype=x.dtype)
        self._linear(
            _KINDS[x.dtype],
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            *_arguments(weight),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            out.stride(0),
            torch.get_num_threads(),
        )
        return out

    def unpack(self, weight: BitmaskWeight, out: torch.Tensor) -> torch.Tensor:
        """Write the dense weight into ``out [rows, columns]``, contiguous."""
        self._unpack(_KINDS[out.dtype], *_arguments(weight), out.data_ptr(), torch.get_num_threads())
        return out


def linear(x: torch.Tensor, weight: BitmaskWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """``x [batch, columns]`` times the packed weight on the CPU, by whichever way is there and fits the batch."""
    library = load()
    if library is not None and x.shape[0] <= library.level.largest_batch:
        return library.linear(x, weight, bias)
    out = torch.empty(x.shape[0], weight.rows, dtype=x.dtype)
    tile = max(64, _TILE_BYTES // (weight.columns * x.element_size()))
    workspace = torch.empty(min(tile, weight.rows), weight.columns, dtype=x.dtype)
    for start in range(0, weight.rows, tile):
        stop = min(start + tile, weight.rows)
        # The offsets stay as they are: values are counted from the weight's first.
        rows = BitmaskWeight(
            stop - start, weight.columns, weight.mask[start:stop], weight.values, weight.offsets[start : stop + 1]
        )
        if library is not None:
            dense = library.unpack(rows, workspace[: stop - start])
        else:
            dense = bitmask.unpack(bitmask.cut_rows(weight, start, stop))
        out[:, start:stop] = functional.linear(x, dense, None if bias is None else bias[start:stop])
    return out


@lru_cache(maxsize=1)
def load() -> Library | None:
    """The library for this processor; None without one (no compiler, or ``SPARSEDEPLOY_CPU_KERNEL=off``)."""
    if os.environ.get("SPARSEDEPLOY_CPU_KERNEL") == "off":
        return None
    level = best_level()
    try:
        return Library(find_or_compile(level), level)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        logger.warning(
            "no CPU kernel (%s): packed weights are unpacked for every product, which is slow. Install g++.",
            " ".join(str(reason).split())[:200],
        )
        return None


def best_level() -> Level:
    """The first level whose instructions this processor has."""
    flags = _processor_flags()
    return next(level for level in LEVELS if level.needs <= flags)


def find_or_compile(level: Level) -> Path:
    """The library's file: from the wheel, from the cache, or compiled into it.

    Raises:
        OSError: no compiler, or a cache folder that cannot be written.
        subprocess.SubprocessError: the compiler failed.
    """
    prebuilt = PREBUILT / f"{level.name}-{platform.machine()}.so"
    if prebuilt.is_file() and _loads(prebuilt):
        return prebuilt
    digest = hashlib.sha256(SOURCE.read_bytes() + repr((FLAGS, level.compiler_flags)).encode()).hexdigest()[:16]
    path = cache_home() / "kernels" / f"packed-{level.name}-{platform.machine()}-{digest}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        compile_library(level, path)
        if not _loads(path):
            compile_library(level, path, own_openmp=True)
    return path


def _loads(path: Path) -> bool:
    try:
        ctypes.CDLL(str(path))
    except OSError:
        return False
    return True


def _processor_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def _arguments(weight: BitmaskWeight) -> tuple[int, ...]:
    return (
        weight.mask.data_ptr(),
        weight.values.data_ptr(),
        weight.offsets.data_ptr(),
        weight.rows,
        weight.columns,
        weight.count,
    )
