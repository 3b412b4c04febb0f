"""Order statistics of many tensors at once, without concatenating them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

_HALF = 16  # a float32's bits are found in two rounds of 16


def lower_median(parts: Callable[[], Iterable[torch.Tensor]]) -> float:
    """The exact lower median (as ``torch.median``) of non-negative float32 values that come in parts.

    Non-negative floats order like their bit patterns, so two counting passes find the value: the first counts the
    upper 16 bits, the second the lower 16 bits of those in the median's bin. Memory: one part and 65 536 counts.

    Args:
        parts: called once per pass; yields the same tensors each time.

    Returns:
        NaN when a value is not finite.
    """
    upper = torch.zeros(1 << _HALF, dtype=torch.int64)
    for part in parts():
        if not torch.isfinite(part).all():
            return float("nan")
        upper += torch.bincount(_bits(part) >> _HALF, minlength=1 << _HALF).cpu()
    rank = (int(upper.sum()) - 1) // 2
    high = int(torch.searchsorted(upper.cumsum(0), rank, right=True))
    rank -= int(upper[:high].sum())
    lower = torch.zeros(1 << _HALF, dtype=torch.int64)
    for part in parts():
        bits = _bits(part)
        inside = bits[(bits >> _HALF) == high]
        lower += torch.bincount(inside & ((1 << _HALF) - 1), minlength=1 << _HALF).cpu()
    low = int(torch.searchsorted(lower.cumsum(0), rank, right=True))
    return torch.tensor(high << _HALF | low, dtype=torch.int32).view(torch.float32).item()


def _bits(values: torch.Tensor) -> torch.Tensor:
    """The bit patterns as int32; adding 0 turns -0 into +0."""
    return (values.float() + 0.0).flatten().view(torch.int32)
