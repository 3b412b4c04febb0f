"""Compile the CPU kernel. Needs only the standard library, so that the wheel's build can use it too."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "csrc" / "packed_cpu.cpp"
# GCC 12 warns about its own intrinsics.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-w")
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mpopcnt")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vbmi2")


@dataclass(frozen=True)
class Level:
    """An instruction set that the kernel can be compiled for.

    Attributes:
        needs: processor flags, as Linux names them.
        compiler_flags: what the compiler is told.
        largest_batch: rows of x up to which the packed product is taken; above, tiles are unpacked and multiplied
            densely. Measured: where the expansion no longer hides behind the memory.
    """

    name: str
    needs: frozenset[str]
    compiler_flags: tuple[str, ...]
    largest_batch: int


_VBMI2 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_vbmi2", "bmi2", "fma", "f16c"})
LEVELS = (
    Level("avx512bf16", _VBMI2 | {"avx512_bf16"}, (*_AVX512, "-mavx512bf16"), 64),
    Level("avx512", _VBMI2, _AVX512, 32),
    Level("avx2", frozenset({"avx2", "fma", "f16c", "bmi2"}), _AVX2, 16),
    Level("portable", frozenset(), (), 4),
)


def compile_library(level: Level, path: Path, *, own_openmp: bool = False) -> None:
    """Compile the library for a level; the file appears whole or not at all.

    Args:
        own_openmp: link an OpenMP library. By default its functions are left open, to be found in the one that torch
            has loaded: one pool of threads in the process instead of two.

    Raises:
        OSError: no compiler.
        subprocess.SubprocessError: the compiler failed or took longer than two minutes.
    """
    compiler = find_compiler()
    if compiler is None:
        raise OSError("no C++ compiler found")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, library = Path(folder) / "packed.o", Path(folder) / "packed.so"
        _run([compiler, *FLAGS, *level.compiler_flags, "-c", str(SOURCE), "-o", str(compiled)])
        openmp = ["-fopenmp"] if own_openmp else []
        _run([compiler, "-shared", *openmp, str(compiled), "-o", str(library)])
        os.replace(library, path)


def find_compiler() -> str | None:
    """The C++ compiler: the one that ``CXX`` names, else the first that is found."""
    chosen = os.environ.get("CXX")
    names = (chosen,) if chosen else ("g++", "c++", "clang++")
    return next((found for name in names if (found := shutil.which(name))), None)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
