"""Masks: boolean tensors, True where a weight is **kept**; applied, packed to one bit a weight, and checked.

Packed, bit ``j`` of byte ``i`` of a row stands for column ``8 i + j`` (little endian), everywhere.
"""

from __future__ import annotations

import numpy as np
import torch

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def apply_mask(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The weight with masked entries exactly +0, survivors bit-identical.

    By an "and" of the bits, which is vectorised for every type, where a choice of values is not.
    """
    bits = _INTEGER_OF_SIZE[weight.element_size()]
    return (weight.view(bits) & mask.to(bits).neg_()).view(weight.dtype)


def broken_groups(mask: torch.Tensor, n: int, m: int) -> int:
    """The groups of ``m`` consecutive columns that keep more than ``n`` weights; all where ``m`` divides no row."""
    rows, columns = mask.shape
    if columns % m:
        return rows * -(-columns // m)
    return int((mask.reshape(rows, columns // m, m).sum(dim=-1) > n).sum())


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """Bool ``[rows, columns]`` to uint8 ``[rows, ceil(columns / 8)]``; the last byte is padded with zeros."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.packbits(bits.numpy(), axis=1, bitorder="little"))
    rows, columns = bits.shape
    padded = torch.zeros(rows, -(-columns // 8) * 8, dtype=torch.uint8, device=bits.device)
    padded[:, :columns] = bits
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (padded.view(rows, -1, 8) * weights).sum(dim=2, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of :func:`pack_bits`: bool ``[rows, columns]``."""
    if packed.device.type == "cpu":
        unpacked = np.unpackbits(packed.numpy(), axis=1, count=columns, bitorder="little")
        return torch.from_numpy(unpacked.view(np.bool_))
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, :, None] >> places) & 1
    return bits.flatten(1)[:, :columns].bool()
