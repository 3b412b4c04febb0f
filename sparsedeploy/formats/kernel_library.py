"""The CPU kernels of ``export/kernels``: compiled at first use, kept under the cache folder, called through ctypes.

The library has a plain C interface, so one file serves every Python and torch. Without a compiler there is none, and
callers unpack weights instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from sparsedeploy.errors import UserError
from sparsedeploy.formats import packed, quantized
from sparsedeploy.formats.packed import PackedWeight
from sparsedeploy.formats.quantized import QuantizedWeight
from sparsedeploy.resources import cache_folder, shipped

logger = logging.getLogger(__name__)

VARIABLE = "SPARSEDEPLOY_CPU_KERNEL"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread")
# The numbers that the library gives to types of values and activations.
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INT8, _INT4 = 3, 4
CODES = (_INT8, _INT4)


class _Info(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("type", ctypes.c_int),
        ("group", ctypes.c_int32),
        ("values", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
    )


class Matrix:
    """A weight in the kernels' layout; its memory is freed with the object."""

    def __init__(self, library: Library, address: int) -> None:
        self.library = library
        self.address = address

    def __del__(self) -> None:
        self.library.free(self.address)

    def __deepcopy__(self, memo: Any) -> Matrix:
        """It is never changed, so copies of a model share it."""
        return self


class Library:
    """The compiled functions; ``sparsedeploy_kernels.h`` describes them."""

    def __init__(self, path: Path) -> None:
        c = ctypes.CDLL(str(path))
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        signatures: dict[str, tuple[Any, ...]] = {
            "pack_dense": (number, pointer, size, size, size, pointer, number, pointer),
            "pack_quantized": (number, number, pointer, pointer, size, size, pointer, number, pointer),
            "linear": (pointer, number, pointer, size, size, size, pointer, pointer, size, number),
            "describe": (pointer, pointer),
            "unpack": (pointer, size, size, pointer, size),
            "free": (pointer,),
        }
        for name, arguments in signatures.items():
            getattr(c, f"sd_{name}").argtypes = arguments
        c.sd_isa_name.restype = c.sd_status_text.restype = ctypes.c_char_p
        c.sd_free.restype = None
        self.free = c.sd_free
        self._c = c
        self._linear = c.sd_linear

    @property
    def instruction_set(self) -> str:
        """Of the kernels in use: the best that the processor has, or the one that ``SPARSEDEPLOY_ISA`` names."""
        name: bytes = self._c.sd_isa_name()
        return name.decode()

    def pack(self, weight: PackedWeight) -> Matrix:
        """Bring a checked weight on the CPU into the kernels' layout; its values stay as they are."""
        rows, columns = weight.rows, weight.columns
        handle = ctypes.c_void_p()
        threads = torch.get_num_threads()
        if isinstance(weight, QuantizedWeight):
            codes, scales = quantized.unpack_codes(weight), weight.scales.contiguous()
            kind = _INT8 if weight.bits == 8 else _INT4
            sizes = (codes.data_ptr(), scales.data_ptr(), rows, columns, None, threads)
            self._check(self._c.sd_pack_quantized(kind, weight.group, *sizes, ctypes.byref(handle)))
        else:
            dense = packed.unpack(weight)
            sizes = (dense.data_ptr(), columns, rows, columns, None, threads)
            self._check(self._c.sd_pack_dense(_TYPES[dense.dtype], *sizes, ctypes.byref(handle)))
        assert handle.value is not None
        return Matrix(self, handle.value)

    def linear(self, address: int, x: torch.Tensor, rows: int, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [batch, columns]`` times the matrix, plus a bias: ``[batch, rows]`` of x's dtype, summed in float32."""
        batch, columns = x.shape
        if batch == 0:
            return x.new_empty(0, rows)
        if x.stride(1) != 1 or x.stride(0) < columns:
            x = x.contiguous()
        out = torch.empty(batch, rows, dtype=x.dtype)
        status = self._linear(
            address,
            _TYPES[x.dtype],
            x.data_ptr(),
            columns,
            max(x.stride(0), columns),
            batch,
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            rows,
            torch.get_num_threads(),
        )
        self._check(status)
        return out

    def unpack(self, address: int, first: int, last: int, columns: int) -> torch.Tensor:
        """Rows ``first`` to ``last`` as float32 ``[last - first, columns]``."""
        out = torch.empty(last - first, columns)
        self._check(self._c.sd_unpack(address, first, last, out.data_ptr(), columns))
        return out

    def value_type(self, address: int) -> int:
        """The number of the type of a matrix's values."""
        info = _Info()
        self._check(self._c.sd_describe(address, ctypes.byref(info)))
        return int(info.type)

    def _check(self, status: int) -> None:
        if status:
            text: bytes = self._c.sd_status_text(status)
            raise ValueError(f"the CPU kernels refuse: {text.decode()}")


@lru_cache(maxsize=1)
def load() -> Library | None:
    """The library; None without one (no compiler, or ``SPARSEDEPLOY_CPU_KERNEL=off``)."""
    if os.environ.get(VARIABLE) == "off":
        return None
    try:
        return Library(find_or_compile(shipped("export") / "kernels"))
    except (OSError, subprocess.SubprocessError, UserError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        logger.warning(
            "no CPU kernels (%s): packed weights are unpacked for every product, which is slow. Install g++.",
            " ".join(str(reason).split())[:200],
        )
        return None


def find_or_compile(folder: Path) -> Path:
    """The library's file, compiled from the sources in ``folder`` where the cache has none.

    Compiling takes most of a minute of processor time: of processes that start together, one compiles.

    Raises:
        OSError: no compiler, or a cache folder that cannot be written.
        subprocess.SubprocessError: the compiler failed.
    """
    sources = [*sorted((folder / "src").glob("*.cpp")), folder / "openmp" / "linear.cpp"]
    content = b"".join(
        path.read_bytes() for path in sorted(folder.rglob("*.*")) if path.suffix in (".cpp", ".h", ".inl")
    )
    digest = hashlib.sha256(content + repr(FLAGS).encode()).hexdigest()[:16]
    path = cache_folder("kernels") / f"sparsedeploy-kernels-{platform.machine()}-{digest}.so"
    if not path.is_file():
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():
                _compile(sources, folder / "include", path)
    return path


def _compile(sources: list[Path], include: Path, path: Path) -> None:
    """Compile the library; the file appears whole or not at all.

    OpenMP's functions are left open, to be found in the library that torch has loaded: one pool of threads in the
    process instead of two. Where torch has none, the library brings its own.
    """
    chosen = os.environ.get("CXX")
    names = (chosen,) if chosen else ("g++", "c++", "clang++")
    compiler = next((found for name in names if (found := shutil.which(name))), None)
    if compiler is None:
        raise OSError("no C++ compiler found")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]

        def one(source: Path, target: Path) -> None:
            openmp = ("-fopenmp",) if source.parent.name == "openmp" else ()
            _run([compiler, *FLAGS, *openmp, f"-I{include}", "-c", str(source), "-o", str(target)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(one, sources, objects))
        library = Path(scratch) / "library.so"
        link = [compiler, "-shared", "-pthread", *map(str, objects), "-o", str(library)]
        _run(link)
        try:
            ctypes.CDLL(str(library))
        except OSError:
            _run([*link, "-fopenmp"])
        os.replace(library, path)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
