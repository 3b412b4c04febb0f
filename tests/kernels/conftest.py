"""The kernels' library and a thin layer over its C interface."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsedeploy.formats.kernel_library import find_or_compile

SOURCES = Path(__file__).resolve().parents[2] / "export" / "kernels"
ISAS = ("portable", "avx2", "avxvnni", "avx512", "avx512bf16")
TYPES = {"f32": 0, "bf16": 1, "f16": 2, "int8": 3, "int4": 4}
Array = np.ndarray[Any, Any]


def pointer(array: Array | None) -> ctypes.c_void_p | None:
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def aligned(size: int) -> Array:
    """Bytes that begin at a multiple of 64."""
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


class Info(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("type", ctypes.c_int),
        ("group", ctypes.c_int32),
        ("values", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
    ]


class Refused(Exception):
    """A status other than 0; its number is the argument."""


class Matrix:
    """A packed matrix; freed with the object."""

    def __init__(self, library: Library, handle: ctypes.c_void_p) -> None:
        self.library = library
        self.handle = handle
        self.info = Info()
        library.call("describe", handle, ctypes.byref(self.info))

    def __del__(self) -> None:
        self.library.c.sd_free(self.handle)

    def unpack(self, first: int = 0, last: int | None = None) -> Array:
        last = self.info.rows if last is None else last
        out = np.full((last - first, self.info.columns), np.nan, np.float32)
        self.library.call("unpack", self.handle, first, last, pointer(out), self.info.columns)
        return out

    def matmul(self, x: Array, shares: int = 1) -> Array:
        """``x [batch, columns]`` times the weight, the rows in so many shares."""
        batch, rows = x.shape[0], self.info.rows
        buffer = aligned(self.library.c.sd_activation_bytes(self.handle, batch))
        self.library.call("prepare_activations", self.handle, pointer(x), x.shape[1], batch, 0, batch, pointer(buffer))
        out = np.full((batch, rows), np.nan, np.float32)
        first, last = ctypes.c_int64(), ctypes.c_int64()
        for index in range(shares):
            self.library.c.sd_share_rows(self.handle, index, shares, ctypes.byref(first), ctypes.byref(last))
            self.library.call(
                "matmul", self.handle, pointer(buffer), batch, first.value, last.value, pointer(out), rows
            )
        return out


class Library:
    """The C functions; every number that is not declared otherwise is 64 bits wide."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        size, number, address = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
        signatures: dict[str, tuple[Any, ...]] = {
            "pack_dense": (number, address, size, size, size, address, number, address),
            "pack_quantized": (number, number, address, address, size, size, address, number, address),
            "pack_gguf": (number, address, ctypes.c_size_t, size, size, number, address),
            "pack_gguf_full": (number, address, ctypes.c_size_t, size, size, number, address),
            "describe": (address, address),
            "unpack": (address, size, size, address, size),
            "prepare_activations": (address, address, size, size, size, size, address),
            "matmul": (address, address, size, size, size, address, size),
            "activation_bytes": (address, size),
            "share_rows": (address, number, number, address, address),
            "free": (address,),
            "use_isa": (ctypes.c_char_p,),
            "isa_name": (),
        }
        for name, arguments in signatures.items():
            getattr(self.c, f"sd_{name}").argtypes = arguments
        self.c.sd_activation_bytes.restype = ctypes.c_size_t
        self.c.sd_isa_name.restype = ctypes.c_char_p
        self.c.sd_status_text.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.c, f"sd_{name}")(*arguments)
        if status:
            raise Refused(status)

    def _packed(self, name: str, *arguments: Any) -> Matrix:
        handle = ctypes.c_void_p()
        self.call(name, *arguments, 2, ctypes.byref(handle))
        return Matrix(self, handle)

    def dense(self, kind: str, weight: Array, mask: Array | None = None) -> Matrix:
        rows, columns = weight.shape
        return self._packed("pack_dense", TYPES[kind], pointer(weight), columns, rows, columns, pointer(mask))

    def quantized(self, kind: str, group: int, codes: Array, scales: Array, mask: Array | None = None) -> Matrix:
        where = (pointer(codes), pointer(scales), *codes.shape, pointer(mask))
        return self._packed("pack_quantized", TYPES[kind], group, *where)

    def gguf(self, kind: int, data: Array, rows: int, columns: int, *, full: bool = False) -> Matrix:
        name = "pack_gguf_full" if full else "pack_gguf"
        return self._packed(name, kind, pointer(data), data.nbytes // rows, rows, columns)

    def use(self, isa: str) -> None:
        """Use an instruction set, or skip where the processor lacks it."""
        if self.c.sd_use_isa(isa.encode()):
            pytest.skip(f"this processor has no {isa}")


@pytest.fixture(scope="session")
def library_path() -> Path:
    """The file that the package compiles and keeps in the user's cache folder."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the kernels")
    return find_or_compile(SOURCES)


@pytest.fixture
def library(library_path: Path) -> Iterator[Library]:
    result = Library(library_path)
    best = result.c.sd_isa_name()
    yield result
    result.c.sd_use_isa(best)
