"""Boolean masks as one bit per weight, on the device where they are used."""

from __future__ import annotations

import torch


def pack(mask: torch.Tensor) -> torch.Tensor:
    """bool ``[rows, columns]`` -> uint8 ``[rows, ceil(columns / 8)]``, the first column in the lowest bit."""
    rows, columns = mask.shape
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -columns % 8)).reshape(rows, -1, 8)
    return (padded << _bits(mask.device)).sum(dim=-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of :func:`pack`: bool ``[rows, columns]``."""
    bits = (packed[..., None] >> _bits(packed.device)) & 1
    return bits.reshape(len(packed), -1)[:, :columns].bool()


def _bits(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
