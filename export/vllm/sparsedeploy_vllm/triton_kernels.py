"""Packed products on GPUs, in Triton: nothing to compile for the user, and the same code runs in its interpreter.

- ``vector``: decode. A program takes a few rows of the weight, expands them in registers and multiplies them with one
  to four rows of x. Every packed byte is read once.
- ``tensor``: batches to 64. A tile is expanded and multiplied by ``tl.dot``; all rows of x are in one tile, so every
  packed byte is read once here too.
- above, the weight is unpacked into a workspace and the dense product does the rest.

Bitmask: the place of a value is the number of mask bits before it. Within a byte these eight counts are found at once:
the bits are spread to one per nibble, and a multiplication by 0x11111110 adds up, in each nibble, the nibbles below it.

Values are floating-point numbers (``BITS`` 0), or codes of 8 or 4 bits with a float16 scale per ``GROUP`` columns.
Codes of a bitmask are read as 32-bit words, two for eight int4 codes and two for four int8 codes, and shifted into
place: a load per code would cost more than the bytes. ``gpu.py`` prepares the tensors and starts the kernels.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton functions take no Python types: their arguments are pointers, tiles and compile-time constants.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _codes_from(words_ptr, start, BITS: tl.constexpr):
    """The 32 bits that begin at code ``start``: they may end in the next word."""
    SHIFT: tl.constexpr = 3 if BITS == 4 else 2
    first = start >> SHIFT
    shift = ((start & ((1 << SHIFT) - 1)) * BITS).to(tl.uint32)
    low = tl.load(words_ptr + first).to(tl.uint32, bitcast=True)
    high = tl.load(words_ptr + first + 1).to(tl.uint32, bitcast=True)
    return ((low >> shift) | ((high << 1) << (shift ^ 31))).to(tl.int32, bitcast=True)


@triton.jit
def _scale(scales_ptr, row, row_ok, column, columns, GROUP: tl.constexpr):
    """Scales ``[rows, columns]`` of some columns, float32."""
    groups = (columns + GROUP - 1) // GROUP
    place = row.to(tl.int64)[:, None] * groups + (column // GROUP)[None, :]
    return tl.load(scales_ptr + place, mask=row_ok[:, None] & (column < columns)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _mask_bytes(mask_ptr, row, row_ok, base, first_byte, row_bytes, BYTES: tl.constexpr):
    """Of a step's mask bytes ``[rows, BYTES]``: the bytes, the place of each one's first value, the counts of values
    before each of its bits (a nibble each), and the count of values that each row used."""
    byte_at = first_byte + tl.arange(0, BYTES)
    place = row.to(tl.int64)[:, None] * row_bytes + byte_at[None, :]
    byte = tl.load(mask_ptr + place, mask=row_ok[:, None] & (byte_at < row_bytes)[None, :], other=0).to(tl.int32)
    spread = (byte | (byte << 12)) & 0x000F000F
    spread = (spread | (spread << 6)) & 0x03030303
    spread = (spread | (spread << 3)) & 0x11111111
    before = spread * 0x11111110
    count = ((before >> 28) & 15) + (byte >> 7)
    start = base[:, None] + tl.cumsum(count, axis=1) - count
    return byte, start, before, tl.sum(count, axis=1)


@triton.jit
def _expand_bitmask(
    mask_ptr, values_ptr, scales_ptr, row, row_ok, base, first_byte, row_bytes, columns,
    ROWS: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Weights ``[rows, BYTES, 8]`` of a step, and the count of values that each row used; float32 from codes."""
    byte, start, before, used = _mask_bytes(mask_ptr, row, row_ok, base, first_byte, row_bytes, BYTES)
    bit = tl.arange(0, 8)
    kept = ((byte[:, :, None] >> bit[None, None, :]) & 1) != 0
    nth = (before[:, :, None] >> (4 * bit)[None, None, :]) & 15
    if BITS == 0:
        weight = tl.load(values_ptr + (start[:, :, None] + nth), mask=kept, other=0.0)
    else:
        if BITS == 4:
            word = _codes_from(values_ptr, start, BITS)
            code = (word[:, :, None] << (28 - 4 * nth)) >> 28
        else:
            # A word holds the codes of half a byte's columns.
            half = tl.arange(0, 2)[None, None, :] * ((before >> 16) & 15)[:, :, None]
            word = _codes_from(values_ptr, start[:, :, None] + half, BITS)
            nth_of_half = tl.reshape(nth, (ROWS, BYTES, 2, 4)) - half[:, :, :, None]
            code = tl.reshape((word[:, :, :, None] << (24 - 8 * nth_of_half)) >> 24, (ROWS, BYTES, 8))
        column = (first_byte + tl.arange(0, BYTES)) * 8
        scale = _scale(scales_ptr, row, row_ok, column, columns, GROUP)
        weight = tl.where(kept, code.to(tl.float32) * scale[:, :, None], 0.0)
    return weight, used


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
def _nm_values(
    values_ptr, scales_ptr, row, row_ok, group, group_ok, groups, columns,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Values ``[rows, groups, N]``; float32 from codes."""
    index = tl.arange(0, N)
    place = (row.to(tl.int64)[:, None, None] * groups + group[None, :, None]) * N + index[None, None, :]
    ok = row_ok[:, None, None] & group_ok[None, :, None]
    if BITS == 0:
        values = tl.load(values_ptr + place, mask=ok, other=0.0)
    else:
        if BITS == 4:
            byte = tl.load(values_ptr + (place >> 1), mask=ok, other=0).to(tl.int32)
            code = (byte << (28 - 4 * (place & 1).to(tl.int32))) >> 28
        else:
            code = tl.load(values_ptr + place, mask=ok, other=0).to(tl.int32)
        scale = _scale(scales_ptr, row, row_ok, group * M, columns, GROUP)
        values = code.to(tl.float32) * scale[:, :, None]
    return values


@triton.jit
def _expand_nm(
    values_ptr, scales_ptr, positions_ptr, row, row_ok, first_group, groups, row_bytes, columns,
    GROUPS: tl.constexpr, FIELD: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Weights ``[rows, GROUPS, M]`` of a step; float32 from codes."""
    group = first_group + tl.arange(0, GROUPS)
    group_ok = group < groups
    positions = _nm_positions(positions_ptr, row, row_ok, group, group_ok, row_bytes, FIELD, N, M)
    values = _nm_values(
        values_ptr, scales_ptr, row, row_ok, group, group_ok, groups, columns, N, M, BITS, GROUP
    )  # fmt: skip
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
def _add_kept(total, kept, weight, x_ptr, batch_row, column, columns):
    return tl.where(kept, total + weight * _x_tile(x_ptr, batch_row, column, columns)[None, :], total)


@triton.jit
def _bitmask_vector(
    x_ptr, mask_ptr, values_ptr, scales_ptr, offsets_ptr, bias_ptr, out_ptr, rows, columns, row_bytes,
    BATCH: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """A thread takes whole bytes of the mask and shifts their values out one by one: few instructions a weight."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    base = tl.load(offsets_ptr + row, mask=row_ok, other=0)
    sum0 = tl.zeros((ROWS, BYTES), tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    for first in range(0, row_bytes, BYTES):
        byte, start, before, used = _mask_bytes(mask_ptr, row, row_ok, base, first, row_bytes, BYTES)
        base += used
        column = (first + tl.arange(0, BYTES)) * 8
        if BITS == 0:
            scale = 1.0
        else:
            # A code is shifted to the top of its word, which its scale takes back.
            scale = _scale(scales_ptr, row, row_ok, column, columns, GROUP) * (2.0**BITS / 2.0**32)
            word = _codes_from(values_ptr, start, BITS)
            if BITS == 8:
                high = _codes_from(values_ptr, start + ((before >> 16) & 15), BITS)
        part0 = tl.zeros((ROWS, BYTES), tl.float32)
        part1, part2, part3 = part0, part0, part0
        for bit in tl.static_range(8):
            kept = (byte & (1 << bit)) != 0
            if BITS == 0:
                weight = tl.load(values_ptr + start, mask=kept, other=0.0).to(tl.float32)
                start = tl.where(kept, start + 1, start)
            else:
                if BITS == 8 and bit == 4:
                    word = high
                weight = (word << (32 - BITS)).to(tl.float32)
                word = tl.where(kept, word >> BITS, word)
            part0 = _add_kept(part0, kept, weight, x_ptr, 0, column + bit, columns)
            if BATCH > 1:
                part1 = _add_kept(part1, kept, weight, x_ptr, 1, column + bit, columns)
            if BATCH > 2:
                part2 = _add_kept(part2, kept, weight, x_ptr, 2, column + bit, columns)
            if BATCH > 3:
                part3 = _add_kept(part3, kept, weight, x_ptr, 3, column + bit, columns)
        sum0 += part0 * scale
        sum1 += part1 * scale
        sum2 += part2 * scale
        sum3 += part3 * scale
    _store(out_ptr, bias_ptr, row, row_ok, 0, tl.sum(sum0, axis=1), rows, HAS_BIAS)
    if BATCH > 1:
        _store(out_ptr, bias_ptr, row, row_ok, 1, tl.sum(sum1, axis=1), rows, HAS_BIAS)
    if BATCH > 2:
        _store(out_ptr, bias_ptr, row, row_ok, 2, tl.sum(sum2, axis=1), rows, HAS_BIAS)
    if BATCH > 3:
        _store(out_ptr, bias_ptr, row, row_ok, 3, tl.sum(sum3, axis=1), rows, HAS_BIAS)


@triton.jit
def _nm_vector(
    x_ptr, values_ptr, scales_ptr, positions_ptr, bias_ptr, out_ptr, rows, columns, groups, row_bytes,
    BATCH: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, FIELD: tl.constexpr, N: tl.constexpr,
    M: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Only the N values of a group are multiplied, each with the x that its position names."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    sum0 = tl.zeros((ROWS, GROUPS, N), tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        group_ok = group < groups
        values = _nm_values(
            values_ptr, scales_ptr, row, row_ok, group, group_ok, groups, columns, N, M, BITS, GROUP
        ).to(tl.float32)  # fmt: skip
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
    weight = weight.to(x.dtype)
    if WIDEN:
        x = x.to(tl.float32)
        weight = weight.to(tl.float32)
    return tl.dot(x, tl.trans(weight), total, input_precision="ieee")


@triton.jit
def _bitmask_tensor(
    x_ptr, mask_ptr, values_ptr, scales_ptr, offsets_ptr, bias_ptr, out_ptr, batch, rows, columns, row_bytes,
    BATCH: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    batch_row = tl.arange(0, BATCH)
    base = tl.load(offsets_ptr + row, mask=row_ok, other=0)
    total = tl.zeros((BATCH, ROWS), tl.float32)
    for first in range(0, row_bytes, BYTES):
        weight, used = _expand_bitmask(
            mask_ptr, values_ptr, scales_ptr, row, row_ok, base, first, row_bytes, columns, ROWS, BYTES, BITS, GROUP
        )  # fmt: skip
        base += used
        x = _load_x(x_ptr, batch_row, batch, first * 8 + tl.arange(0, BYTES * 8), columns)
        total = _dot(x, tl.reshape(weight, (ROWS, BYTES * 8)), total, WIDEN)
    _store_tile(out_ptr, bias_ptr, batch_row, batch, row, row_ok, total, rows, HAS_BIAS)


@triton.jit
def _nm_tensor(
    x_ptr, values_ptr, scales_ptr, positions_ptr, bias_ptr, out_ptr, batch, rows, columns, groups, row_bytes,
    BATCH: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, FIELD: tl.constexpr, N: tl.constexpr,
    M: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    batch_row = tl.arange(0, BATCH)
    total = tl.zeros((BATCH, ROWS), tl.float32)
    for first in range(0, groups, GROUPS):
        weight = _expand_nm(
            values_ptr, scales_ptr, positions_ptr, row, row_ok, first, groups, row_bytes, columns,
            GROUPS, FIELD, N, M, BITS, GROUP,
        )  # fmt: skip
        x = _load_x(x_ptr, batch_row, batch, first * M + tl.arange(0, GROUPS * M), columns)
        total = _dot(x, tl.reshape(weight, (ROWS, GROUPS * M)), total, WIDEN)
    _store_tile(out_ptr, bias_ptr, batch_row, batch, row, row_ok, total, rows, HAS_BIAS)


@triton.jit
def _bitmask_unpack(
    mask_ptr, values_ptr, scales_ptr, offsets_ptr, out_ptr, rows, columns, row_bytes,
    ROWS: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    base = tl.load(offsets_ptr + row, mask=row_ok, other=0)
    for first in range(0, row_bytes, BYTES):
        weight, used = _expand_bitmask(
            mask_ptr, values_ptr, scales_ptr, row, row_ok, base, first, row_bytes, columns, ROWS, BYTES, BITS, GROUP
        )  # fmt: skip
        base += used
        column = (first + tl.arange(0, BYTES))[:, None] * 8 + tl.arange(0, 8)[None, :]
        place = row.to(tl.int64)[:, None, None] * columns + column[None, :, :]
        ok = row_ok[:, None, None] & (column < columns)[None, :, :]
        tl.store(out_ptr + place, weight.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _nm_unpack(
    values_ptr, scales_ptr, positions_ptr, out_ptr, rows, columns, groups, row_bytes,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, FIELD: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    for first in range(0, groups, GROUPS):
        weight = _expand_nm(
            values_ptr, scales_ptr, positions_ptr, row, row_ok, first, groups, row_bytes, columns,
            GROUPS, FIELD, N, M, BITS, GROUP,
        )  # fmt: skip
        column = (first + tl.arange(0, GROUPS))[:, None] * M + tl.arange(0, M)[None, :]
        place = row.to(tl.int64)[:, None, None] * columns + column[None, :, :]
        ok = row_ok[:, None, None] & (column < columns)[None, :, :]
        tl.store(out_ptr + place, weight.to(out_ptr.dtype.element_ty), mask=ok)
