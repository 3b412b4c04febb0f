"""Bits and bytes of packed weights: bit ``j`` of byte ``i`` of a row stands for item ``8 i + j`` (little endian)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from sparsedeploy.errors import UserError

# The values travel as integers of the same width, so that every bit pattern survives, NaNs too.
INTEGER_OF = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.int8: torch.int8,
}
_ROWS_PER_TASK = 256
_BIT_COUNTS = np.array([value.bit_count() for value in range(256)], dtype=np.uint8)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Refuse values that cannot be packed.

    Raises:
        UserError: not bfloat16, float16, float32, or int8 codes.
    """
    if dtype not in INTEGER_OF:
        raise UserError(f"{name} holds {dtype} values", "Packed weights are bfloat16, float16, float32, or int8 codes.")


def as_integers(values: torch.Tensor) -> torch.Tensor:
    """The same bits as an integer of the same width."""
    return values.view(INTEGER_OF[values.dtype])


def count_bits(packed: torch.Tensor) -> torch.Tensor:
    """Set bits of every row of uint8 ``[rows, bytes]``, as int64 ``[rows]``."""
    if packed.device.type == "cpu":
        return torch.from_numpy(_BIT_COUNTS[packed.numpy()].sum(axis=1, dtype=np.int64))
    table = torch.from_numpy(_BIT_COUNTS).to(packed.device)
    return table[packed.int()].sum(dim=1, dtype=torch.int64)


def pack_fields(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Codes of ``width`` bits (1 to 8) to bytes, one after the other from the lowest bit up; rows are padded.

    Args:
        codes: uint8 ``[rows, count]``.

    Returns:
        uint8 ``[rows, ceil(count * width / 8)]``.
    """
    if width == 8:
        return codes.contiguous()
    rows, count = codes.shape
    # Eight fields fill exactly ``width`` bytes.
    blocks = -(-count // 8)
    padded = torch.zeros(rows, blocks * 8, dtype=torch.int64, device=codes.device)
    padded[:, :count] = codes
    shifts = torch.arange(8, device=codes.device) * width
    words = (padded.view(rows, blocks, 8) << shifts).sum(dim=2)
    low = words.view(torch.uint8).view(rows, blocks, 8)[:, :, :width]
    return low.reshape(rows, blocks * width)[:, : field_bytes(count, width)].contiguous()


def unpack_fields(packed: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """The inverse of :func:`pack_fields`: uint8 ``[rows, count]``."""
    if width == 8:
        return packed
    rows = packed.shape[0]
    blocks = -(-count // 8)
    padded = torch.zeros(rows, blocks * width, dtype=torch.uint8, device=packed.device)
    padded[:, : packed.shape[1]] = packed
    words = torch.zeros(rows, blocks, 8, dtype=torch.uint8, device=packed.device)
    words[:, :, :width] = padded.view(rows, blocks, width)
    shifts = torch.arange(8, device=packed.device) * width
    codes = (words.view(torch.int64) >> shifts) & ((1 << width) - 1)
    return codes.to(torch.uint8).reshape(rows, blocks * 8)[:, :count]


def field_bytes(count: int, width: int) -> int:
    """Bytes that ``count`` fields of ``width`` bits take."""
    return -(-count * width // 8)


def for_row_blocks(rows: int, device: torch.device, task: Callable[[int, int], None]) -> None:
    """Call ``task(start, stop)`` on blocks of rows: on the CPU with as many threads as torch uses, else once on all."""
    if rows == 0:
        return
    if device.type != "cpu":
        task(0, rows)
        return
    blocks = [(start, min(start + _ROWS_PER_TASK, rows)) for start in range(0, rows, _ROWS_PER_TASK)]
    with ThreadPoolExecutor(min(torch.get_num_threads(), len(blocks))) as pool:
        list(pool.map(lambda block: task(*block), blocks))
