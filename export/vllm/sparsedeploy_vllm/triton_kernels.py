"""Packed products on GPUs, in Triton: nothing to compile for the user, and the same code runs in its interpreter.

- ``vector``: decode. A program takes a few rows of the weight, expands them in registers and multiplies them with one
  to four rows of x. Every packed byte is read once.
- ``tensor``: batches to 64. A tile is expanded and multiplied by ``tl.dot``; all rows of x are in one tile, so every
  packed byte is read once here too.
- above, the weight is unpacked into a workspace and the dense product does the rest.

Bitmask: the place of a value is the number of mask bits before it. Within a byte these eight counts are found at once:
the bits are spread to one per nibble, and a multiplication by 0x11111110 adds up, in each nibble, the nibbles below it.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton functions take no Python types: their arguments are pointers, tiles and compile-time constants.
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional

from sparsedeploy.formats.bitmask import BitmaskWeight
from sparsedeploy.formats.nm import NMWeight, code_bits, stores_positions

# Triton's interpreter, which is how the kernels are tested without a GPU, multiplies no bfloat16 tiles.
INTERPRETED = triton.knobs.runtime.interpret
LARGEST_VECTOR_BATCH = 4
LARGEST_TENSOR_BATCH = 64


@dataclass(frozen=True)
class Config:
    """How a product is run.

    Attributes:
        kernel: ``vector`` or ``tensor``.
        rows: weight rows of a program.
        columns: weight columns of a step.
        warps: warps of a program.
        stages: loads that the compiler keeps in flight.
    """

    kernel: str
    rows: int
    columns: int
    warps: int
    stages: int = 2


@triton.jit
def _expand_bitmask(mask_ptr, values_ptr, row, row_ok, base, first_byte, row_bytes, BYTES: tl.constexpr):
    """Weights ``[rows, BYTES, 8]`` of a step, and the count of values that each row used."""
    byte_at = first_byte + tl.arange(0, BYTES)
    place = row.to(tl.int64)[:, None] * row_bytes + byte_at[None, :]
    byte = tl.load(mask_ptr + place, mask=row_ok[:, None] & (byte_at < row_bytes)[None, :], other=0).to(tl.int32)
    spread = (byte | (byte << 12)) & 0x000F000F
    spread = (spread | (spread << 6)) & 0x03030303
    spread = (spread | (spread << 3)) & 0x11111111
    before = spread * 0x11111110
    count = ((before >> 28) & 15) + (byte >> 7)
    start = base[:, None] + tl.cumsum(count, axis=1) - count
    bit = tl.arange(0, 8)
    kept = ((byte[:, :, None] >> bit[None, None, :]) & 1) != 0
    offset = start[:, :, None] + ((before[:, :, None] >> (4 * bit)[None, None, :]) & 15)
    return tl.load(values_ptr + offset, mask=kept, other=0.0), tl.sum(count, axis=1)


@triton.jit
def _nm_positions(
    positions_ptr, row, row_ok, group, group_ok, row_bytes, FIELD: tl.constexpr, N: tl.constexpr, M: tl.constexpr
):
    """Positions ``[rows, groups, N]`` within the groups."""
    bit = group * FIELD
    first = bit >> 3
    place = positions_ptr + row.to(tl.int64)[:, None] * row_bytes + first[None, :]
    ok = row_ok[:, None] & group_ok[None, :]
    low = tl.load(place, mask=ok, other=0).to(tl.int32)
    # A field may end in the next byte.
    high = tl.load(place + 1, mask=ok & (first + 1 < row_bytes)[None, :], other=0).to(tl.int32)
    code = (low | (high << 8)) >> (bit & 7)[None, :]
    width: tl.constexpr = 2 if M == 4 else 3
    index = tl.arange(0, N)
    return (code[:, :, None] >> (index * width)[None, None, :]) & (M - 1)


@triton.jit
def _nm_values(values_ptr, row, row_ok, group, group_ok, groups, N: tl.constexpr):
    """Values ``[rows, groups, N]``."""
    index = tl.arange(0, N)
    place = (row.to(tl.int64)[:, None, None] * groups + group[None, :, None]) * N + index[None, None, :]
    return tl.load(values_ptr + place, mask=row_ok[:, None, None] & group_ok[None, :, None], other=0.0)


@triton.jit
def _expand_nm(
    values_ptr, positions_ptr, row, row_ok, first_group, groups, row_bytes,
    GROUPS: tl.constexpr, FIELD: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Weights ``[rows, GROUPS, M]`` of a step."""
    group = first_group + tl.arange(0, GROUPS)
    group_ok = group < groups
    positions = _nm_positions(positions_ptr, row, row_ok, group, group_ok, row_bytes, FIELD, N, M)
    values = _nm_values(values_ptr, row, row_ok, group, group_ok, groups, N)
    column = tl.arange(0, M)
    hit = positions[:, :, :, None] == column[None, None, None, :]
    # At most one of the N positions is this column, so the sum is exact.
    return tl.sum(tl.where(hit, values.to(tl.float32)[:, :, :, None], 0.0), axis=2).to(values.dtype)


@triton.jit
def _store(out_ptr, bias_ptr, row, row_ok, batch_row, total, rows, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=row_ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + batch_row * rows + row, total.to(out_ptr.dtype.element_ty), mask=row_ok)


@triton.jit
def _x_tile(x_ptr, batch_row, column, columns):
    return tl.load(x_ptr + batch_row * columns + column, mask=column < columns, other=0.0).to(tl.float32)


@triton.jit
def _bitmask_vector(
    x_ptr, mask_ptr, values_ptr, offsets_ptr, bias_ptr, out_ptr, rows, columns, row_bytes,
    BATCH: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    base = tl.load(offsets_ptr + row, mask=row_ok, other=0)
    sum0 = tl.zeros((ROWS, BYTES, 8), tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    for first in range(0, row_bytes, BYTES):
        weight, used = _expand_bitmask(mask_ptr, values_ptr, row, row_ok, base, first, row_bytes, BYTES)
        weight = weight.to(tl.float32)
        base += used
        column = (first + tl.arange(0, BYTES))[:, None] * 8 + tl.arange(0, 8)[None, :]
        sum0 += weight * _x_tile(x_ptr, 0, column, columns)[None, :, :]
        if BATCH > 1:
            sum1 += weight * _x_tile(x_ptr, 1, column, columns)[None, :, :]
        if BATCH > 2:
            sum2 += weight * _x_tile(x_ptr, 2, column, columns)[None, :, :]
        if BATCH > 3:
            sum3 += weight * _x_tile(x_ptr, 3, column, columns)[None, :, :]
    _store(out_ptr, bias_ptr, row, row_ok, 0, tl.sum(tl.sum(sum0, axis=2), axis=1), rows, HAS_BIAS)
    if BATCH > 1:
        _store(out_ptr, bias_ptr, row, row_ok, 1, tl.sum(tl.sum(sum1, axis=2), axis=1), rows, HAS_BIAS)
    if BATCH > 2:
        _store(out_ptr, bias_ptr, row, row_ok, 2, tl.sum(tl.sum(sum2, axis=2), axis=1), rows, HAS_BIAS)
    if BATCH > 3:
        _store(out_ptr, bias_ptr, row, row_ok, 3, tl.sum(tl.sum(sum3, axis=2), axis=1), rows, HAS_BIAS)


@triton.jit
def _nm_vector(
    x_ptr, values_ptr, positions_ptr, bias_ptr, out_ptr, rows, columns, groups, row_bytes,
    BATCH: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, FIELD: tl.constexpr, N: tl.constexpr,
    M: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Only the N values of a group are multiplied, each with the x that its position names."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    sum0 = tl.zeros((ROWS, GROUPS, N), tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        group_ok = group < groups
        values = _nm_values(values_ptr, row, row_ok, group, group_ok, groups, N).to(tl.float32)
        positions = _nm_positions(positions_ptr, row, row_ok, group, group_ok, row_bytes, FIELD, N, M)
        column = group[None, :, None] * M + positions
        sum0 += values * _x_tile(x_ptr, 0, column, columns)
        if BATCH > 1:
            sum1 += values * _x_tile(x_ptr, 1, column, columns)
        if BATCH > 2:
            sum2 += values * _x_tile(x_ptr, 2, column, columns)
        if BATCH > 3:
            sum3 += values * _x_tile(x_ptr, 3, column, columns)
    _store(out_ptr, bias_ptr, row, row_ok, 0, tl.sum(tl.sum(sum0, axis=2), axis=1), rows, HAS_BIAS)
    if BATCH > 1:
        _store(out_ptr, bias_ptr, row, row_ok, 1, tl.sum(tl.sum(sum1, axis=2), axis=1), rows, HAS_BIAS)
    if BATCH > 2:
        _store(out_ptr, bias_ptr, row, row_ok, 2, tl.sum(tl.sum(sum2, axis=2), axis=1), rows, HAS_BIAS)
    if BATCH > 3:
        _store(out_ptr, bias_ptr, row, row_ok, 3, tl.sum(tl.sum(sum3, axis=2), axis=1), rows, HAS_BIAS)


@triton.jit
def _load_x(x_ptr, batch_row, batch, column, columns):
    ok = (batch_row < batch)[:, None] & (column < columns)[None, :]
    return tl.load(x_ptr + batch_row[:, None] * columns + column[None, :], mask=ok, other=0.0)


@triton.jit
def _store_tile(out_ptr, bias_ptr, batch_row, batch, row, row_ok, total, rows, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=row_ok, other=0.0).to(tl.float32)[None, :]
    ok = (batch_row < batch)[:, None] & row_ok[None, :]
    tl.store(out_ptr + batch_row[:, None] * rows + row[None, :], total.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _dot(x, weight, total, WIDEN: tl.constexpr):
    if WIDEN:
        x = x.to(tl.float32)
        weight = weight.to(tl.float32)
    return tl.dot(x, tl.trans(weight), total, input_precision="ieee")


@triton.jit
def _bitmask_tensor(
    x_ptr, mask_ptr, values_ptr, offsets_ptr, bias_ptr, out_ptr, batch, rows, columns, row_bytes,
    BATCH: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, HAS_BIAS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    batch_row = tl.arange(0, BATCH)
    base = tl.load(offsets_ptr + row, mask=row_ok, other=0)
    total = tl.zeros((BATCH, ROWS), tl.float32)
    for first in range(0, row_bytes, BYTES):
        weight, used = _expand_bitmask(mask_ptr, values_ptr, row, row_ok, base, first, row_bytes, BYTES)
        base += used
        x = _load_x(x_ptr, batch_row, batch, first * 8 + tl.arange(0, BYTES * 8), columns)
        total = _dot(x, tl.reshape(weight, (ROWS, BYTES * 8)), total, WIDEN)
    _store_tile(out_ptr, bias_ptr, batch_row, batch, row, row_ok, total, rows, HAS_BIAS)


@triton.jit
def _nm_tensor(
    x_ptr, values_ptr, positions_ptr, bias_ptr, out_ptr, batch, rows, columns, groups, row_bytes,
    BATCH: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, FIELD: tl.constexpr, N: tl.constexpr,
    M: tl.constexpr, HAS_BIAS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    batch_row = tl.arange(0, BATCH)
    total = tl.zeros((BATCH, ROWS), tl.float32)
    for first in range(0, groups, GROUPS):
        weight = _expand_nm(
            values_ptr, positions_ptr, row, row_ok, first, groups, row_bytes, GROUPS, FIELD, N, M
        )  # fmt: skip
        x = _load_x(x_ptr, batch_row, batch, first * M + tl.arange(0, GROUPS * M), columns)
        total = _dot(x, tl.reshape(weight, (ROWS, GROUPS * M)), total, WIDEN)
    _store_tile(out_ptr, bias_ptr, batch_row, batch, row, row_ok, total, rows, HAS_BIAS)


@triton.jit
def _bitmask_unpack(
    mask_ptr, values_ptr, offsets_ptr, out_ptr, rows, columns, row_bytes, ROWS: tl.constexpr, BYTES: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    base = tl.load(offsets_ptr + row, mask=row_ok, other=0)
    for first in range(0, row_bytes, BYTES):
        weight, used = _expand_bitmask(mask_ptr, values_ptr, row, row_ok, base, first, row_bytes, BYTES)
        base += used
        column = (first + tl.arange(0, BYTES))[:, None] * 8 + tl.arange(0, 8)[None, :]
        place = row.to(tl.int64)[:, None, None] * columns + column[None, :, :]
        tl.store(out_ptr + place, weight, mask=row_ok[:, None, None] & (column < columns)[None, :, :])


@triton.jit
def _nm_unpack(
    values_ptr, positions_ptr, out_ptr, rows, columns, groups, row_bytes,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, FIELD: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    for first in range(0, groups, GROUPS):
        weight = _expand_nm(
            values_ptr, positions_ptr, row, row_ok, first, groups, row_bytes, GROUPS, FIELD, N, M
        )  # fmt: skip
        column = (first + tl.arange(0, GROUPS))[:, None] * M + tl.arange(0, M)[None, :]
        place = row.to(tl.int64)[:, None, None] * columns + column[None, :, :]
        tl.store(out_ptr + place, weight, mask=row_ok[:, None, None] & (column < columns)[None, :, :])


def linear(
    x: torch.Tensor, weight: BitmaskWeight | NMWeight, bias: torch.Tensor | None, config: Config | None
) -> torch.Tensor:
    """``x [batch, columns]`` times the packed weight: ``[batch, rows]``, summed in float32.

    Args:
        config: None unpacks the weight and multiplies densely. An N:M weight must store positions
            (:func:`~sparsedeploy.formats.nm.stores_positions`); the others are bitmasks by another name.
    """
    if config is None:
        return functional.linear(x, unpack(weight), bias)
    x = x.contiguous()
    out = torch.empty(x.shape[0], weight.rows, dtype=x.dtype, device=x.device)
    if isinstance(weight, BitmaskWeight):
        _bitmask_linear(x, weight, bias, config, out)
    else:
        _nm_linear(x, weight, bias, config, out)
    return out


def unpack(weight: BitmaskWeight | NMWeight) -> torch.Tensor:
    """The dense weight ``[rows, columns]`` on its device."""
    out = torch.empty(weight.rows, weight.columns, dtype=weight.values.dtype, device=weight.values.device)
    rows, columns = 4, 512
    grid = (triton.cdiv(weight.rows, rows),)
    if isinstance(weight, BitmaskWeight):
        sizes = (weight.rows, weight.columns, weight.mask.shape[1])
        tensors = (weight.mask, weight.values, weight.offsets, out)
        _bitmask_unpack[grid](*tensors, *sizes, ROWS=rows, BYTES=columns // 8, num_warps=4)
    else:
        tile = {"ROWS": rows, **_nm_tile(weight, columns)}
        _nm_unpack[grid](weight.values, weight.positions, out, *_nm_sizes(weight), **tile, num_warps=4)
    return out


def _bitmask_linear(
    x: torch.Tensor, weight: BitmaskWeight, bias: torch.Tensor | None, config: Config, out: torch.Tensor
) -> None:
    tensors = (x, weight.mask, weight.values, weight.offsets, out if bias is None else bias, out)
    sizes = (weight.rows, weight.columns, weight.mask.shape[1])
    options = _options(x, bias, config)
    if config.kernel == "vector":
        _bitmask_vector[_grid(weight, config)](*tensors, *sizes, BYTES=config.columns // 8, **options)
    else:
        _bitmask_tensor[_grid(weight, config)](*tensors, len(x), *sizes, BYTES=config.columns // 8, **options)


def _nm_linear(x: torch.Tensor, weight: NMWeight, bias: torch.Tensor | None, config: Config, out: torch.Tensor) -> None:
    tensors = (x, weight.values, weight.positions, out if bias is None else bias, out)
    options = {**_nm_tile(weight, config.columns), **_options(x, bias, config)}
    if config.kernel == "vector":
        _nm_vector[_grid(weight, config)](*tensors, *_nm_sizes(weight), **options)
    else:
        _nm_tensor[_grid(weight, config)](*tensors, len(x), *_nm_sizes(weight), **options)


def _grid(weight: BitmaskWeight | NMWeight, config: Config) -> tuple[int]:
    return (triton.cdiv(weight.rows, config.rows),)


def _options(x: torch.Tensor, bias: torch.Tensor | None, config: Config) -> dict[str, Any]:
    """What both formats' kernels are compiled for."""
    options = {"ROWS": config.rows, "HAS_BIAS": bias is not None}
    options.update(num_warps=config.warps, num_stages=config.stages)
    if config.kernel == "vector":
        return {"BATCH": len(x), **options}
    # The smallest tile of the tensor cores has 16 rows.
    batch = max(16, triton.next_power_of_2(len(x)))
    return {"BATCH": batch, "WIDEN": INTERPRETED and x.dtype == torch.bfloat16, **options}


def _nm_sizes(weight: NMWeight) -> tuple[int, int, int, int]:
    return (weight.rows, weight.columns, weight.groups, weight.positions.shape[1])


def _nm_tile(weight: NMWeight, columns: int) -> dict[str, int]:
    assert stores_positions(weight.pattern), "convert it with to_bitmask at load time"
    n, m = weight.pattern.n, weight.pattern.m
    return {"GROUPS": columns // m, "FIELD": code_bits(weight.pattern), "N": n, "M": m}
