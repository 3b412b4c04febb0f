"""Bytes that a checkpoint's pruned matrices would take in each format, counted from their masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from sparsedeploy.formats.config import BITMASK, GROUPS, ModuleFormat
from sparsedeploy.formats.packed import tensor_layout
from sparsedeploy.plan import NM

if TYPE_CHECKING:
    import torch

_PATTERNS = (4, 8)
_GROUP = GROUPS[-1]
# Bytes of a block of 32 weights, as GGUF stores them whatever their values.
_GGUF = {"Q8_0": 34, "Q4_0": 18}
_BLOCK = 32


@dataclass(frozen=True)
class Matrix:
    """What the size of a matrix depends on.

    Attributes:
        kept: weights that the mask keeps.
        smallest_n: M -> the least N of which every group of M columns keeps at most N; no entry where M does not
            divide the columns.
    """

    rows: int
    columns: int
    kept: int
    smallest_n: Mapping[int, int]

    @property
    def size(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class FormatSize:
    """All matrices in one format.

    Attributes:
        name: of the format; ``loads`` says what reads it.
        bytes: None where a matrix does not fit it.
        note: why not, or what else to know.
    """

    name: str
    loads: str
    bytes: int | None
    note: str = ""


def measure(mask: torch.Tensor) -> Matrix:
    """The counts of one mask, bool ``[rows, columns]``, True where kept."""
    rows, columns = mask.shape
    smallest = {
        m: int(mask.view(rows, columns // m, m).sum(dim=2).max())
        for m in _PATTERNS
        if mask.numel() and columns % m == 0
    }
    return Matrix(rows, columns, int(mask.sum()), smallest)


def format_sizes(matrices: Iterable[Matrix], value_bytes: int = 2) -> list[FormatSize]:
    """Bytes in every format that a target writes, with the dense ones to compare.

    Args:
        value_bytes: of a floating-point value; 2 for float16 and bfloat16.
    """
    every = list(matrices)
    weights = sum(one.size for one in every)
    kind = f"{8 * value_bytes}-bit values"
    found = [
        FormatSize("dense float32", "transformers, DeepSparse, ONNX Runtime", 4 * weights),
        FormatSize("dense 16-bit", "transformers, vLLM", 2 * weights),
        FormatSize(f"bitmask, {kind}", "vLLM (plugin)", sum(_packed(one, value_bytes) for one in every)),
    ]
    for bits in (8, 4):
        name = f"bitmask, int{bits}"
        size = sum(_packed(one, value_bytes, bits=bits) for one in every)
        found.append(FormatSize(name, "vLLM (plugin)", size, f"a 16-bit scale for every {_GROUP} columns"))
    found += [_in_pattern(every, m, value_bytes) for m in _PATTERNS]
    best = sum(min(_choices(one, value_bytes)) for one in every)
    found.append(FormatSize("smallest for each matrix", "vLLM (plugin)", best, "what export --target vllm writes"))
    found.append(FormatSize("GGUF F16", "llama.cpp", 2 * weights))
    for name, block in _GGUF.items():
        found.append(_in_blocks(every, name, block))
    return found


def _in_pattern(matrices: list[Matrix], m: int, value_bytes: int) -> FormatSize:
    """The N:M format with the least N that every matrix follows."""
    loads, n = "vLLM (plugin)", max((one.smallest_n.get(m, m) for one in matrices), default=m)
    if any(m not in one.smallest_n for one in matrices):
        return FormatSize(f"N:{m}", loads, None, f"{m} does not divide the columns of every matrix")
    if n == m:
        return FormatSize(f"N:{m}", loads, None, f"some group keeps all {m} of its weights")
    pattern = NM(max(n, 1), m)
    return FormatSize(str(pattern), loads, sum(_packed(one, value_bytes, pattern) for one in matrices))


def _in_blocks(matrices: list[Matrix], name: str, block: int) -> FormatSize:
    if any(one.columns % _BLOCK for one in matrices):
        return FormatSize(f"GGUF {name}", "llama.cpp", None, f"{_BLOCK} does not divide the columns of every matrix")
    size = sum(one.size // _BLOCK * block for one in matrices)
    return FormatSize(f"GGUF {name}", "llama.cpp", size, "on disk; the backend packs zeros away when it loads")


def _choices(one: Matrix, value_bytes: int) -> list[int]:
    patterns = [NM(max(n, 1), m) for m, n in one.smallest_n.items()]
    return [
        one.size * value_bytes,
        _packed(one, value_bytes),
        *(_packed(one, value_bytes, pattern) for pattern in patterns),
    ]


def _packed(one: Matrix, value_bytes: int, pattern: NM | None = None, bits: int | None = None) -> int:
    """Bytes of a matrix's tensors in a packed format."""
    values = one.kept if pattern is None else one.size // pattern.m * pattern.n
    entry = ModuleFormat(
        BITMASK if pattern is None else str(pattern),
        one.rows,
        one.columns,
        values,
        bits,
        None if bits is None else _GROUP,
    )
    return sum(
        prod(shape) * (dtype.itemsize if dtype is not None else value_bytes)
        for shape, dtype in tensor_layout(entry).values()
    )
