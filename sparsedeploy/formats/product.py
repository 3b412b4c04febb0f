"""Products with packed weights: a weight is prepared once for its device and then multiplied many times.

On CPUs the kernels of ``export/kernels`` multiply; without a compiler, and on GPUs without the ``sparsedeploy-vllm``
distribution, the weight is unpacked for every product: right everywhere, and slow.

The products are torch operators, so that ``torch.compile`` sees one opaque call. ``sparsedeploy::cpu_linear`` is
defined here, its counterpart for GPUs where the Triton kernels are.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.nn import functional

from sparsedeploy.formats import kernel_library
from sparsedeploy.formats import packed as packing
from sparsedeploy.formats.kernel_library import Matrix
from sparsedeploy.formats.packed import PackedWeight

_LIBRARY = torch.library.Library("sparsedeploy", "DEF")
_LIBRARY.define("cpu_linear(Tensor x, Tensor address, int rows, Tensor? bias) -> Tensor")

# Up to this many rows of x, the packed product reads far fewer bytes than unpacking writes.
_ALWAYS_PACKED = 16
# Bytes of float32 weight that are unpacked at a time: they stay in the last cache until they are multiplied.
_TILE_BYTES = 8 << 20
_REPETITIONS = 3
_unpacking_wins: dict[tuple[object, ...], bool] = {}


class Prepared(Protocol):
    """A weight ``[rows, columns]`` in the form that its device's kernels read."""

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> int: ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """What it reads, by name."""
        ...

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> Prepared:
        """The same weight that reads these instead."""
        ...

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [batch, columns]`` times the weight, plus a bias ``[rows]``: ``[batch, rows]``."""
        ...


def prepare(weight: PackedWeight) -> Prepared:
    """Bring a checked weight into the form in which its device multiplies it best, still packed."""
    device = weight.values.device.type
    if device == "cpu" and (library := kernel_library.load()) is not None:
        matrix = library.pack(weight)
        return CpuWeight(weight.rows, weight.columns, matrix, torch.tensor([matrix.address]))
    if device == "cuda":
        try:
            prepared: Prepared = importlib.import_module("sparsedeploy_vllm.gpu").prepare(weight)
            return prepared
        except ImportError:
            pass
    return StoredWeight(weight)


def multiply(x: torch.Tensor, weight: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x [..., columns]`` times a prepared weight, plus a bias ``[rows]``: ``[..., rows]``."""
    return weight.product(x.reshape(-1, x.shape[-1]), bias).reshape(*x.shape[:-1], weight.rows)


@dataclass(frozen=True)
class StoredWeight:
    """A weight as its checkpoint stores it: it is unpacked for every product."""

    weight: PackedWeight

    @property
    def rows(self) -> int:
        return self.weight.rows

    @property
    def columns(self) -> int:
        return self.weight.columns

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.weight.tensors()

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> StoredWeight:
        return StoredWeight(packing.assemble(packing.describe(self.weight), tensors))

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x, packing.unpack(self.weight).to(x.dtype), bias)


@dataclass(frozen=True)
class CpuWeight:
    """A weight in the CPU kernels' layout.

    Attributes:
        matrix: owns its memory.
        address: int64 ``[1]``, where that lies. A tensor, so that compiled code does not depend on the number.
    """

    rows: int
    columns: int
    matrix: Matrix
    address: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"address": self.address}

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> CpuWeight:
        return replace(self, address=tensors["address"])

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = torch.ops.sparsedeploy.cpu_linear(x, self.address, self.rows, bias)
        return out


def _cpu_linear(x: torch.Tensor, address: torch.Tensor, rows: int, bias: torch.Tensor | None) -> torch.Tensor:
    library = kernel_library.load()
    assert library is not None, "a matrix in their layout needs the kernels"
    place = int(address.item())
    if x.shape[0] > _ALWAYS_PACKED and _unpacking_is_faster(library, place, x, rows):
        return _unpacked_product(library, place, x, rows, bias)
    return library.linear(place, x, rows, bias)


def _unpacked_product(
    library: kernel_library.Library, place: int, x: torch.Tensor, rows: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """Unpack tiles of rows and multiply them densely."""
    columns = x.shape[1]
    out = torch.empty(x.shape[0], rows, dtype=x.dtype)
    tile = max(64, _TILE_BYTES // (4 * columns))
    for start in range(0, rows, tile):
        stop = min(start + tile, rows)
        dense = library.unpack(place, start, stop, columns).to(x.dtype)
        out[:, start:stop] = functional.linear(x, dense, None if bias is None else bias[start:stop])
    return out


def _unpacking_is_faster(library: kernel_library.Library, place: int, x: torch.Tensor, rows: int) -> bool:
    """Whether many rows of x are multiplied faster by unpacking: measured once for each shape and size of batch.

    Weights of codes are never unpacked: their product rounds x to 8 bits, and results must not depend on a clock.
    """
    kind = library.value_type(place)
    if kind in kernel_library.CODES:
        return False
    key = (rows, x.shape[1], kind, x.dtype, (x.shape[0] - 1).bit_length(), torch.get_num_threads())
    if key not in _unpacking_wins:
        packed = _best_time(lambda: library.linear(place, x, rows, None))
        _unpacking_wins[key] = _best_time(lambda: _unpacked_product(library, place, x, rows, None)) < packed
    return _unpacking_wins[key]


def _best_time(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(_REPETITIONS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


_LIBRARY.impl("cpu_linear", _cpu_linear, "CPU")


@torch.library.register_fake("sparsedeploy::cpu_linear")
def _cpu_linear_fake(x: torch.Tensor, address: torch.Tensor, rows: int, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], rows)
