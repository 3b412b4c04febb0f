"""int8 and int4 values with a scale per group, in either packed format. ``docs/format.md`` is the specification.

The codes are a packed matrix like any other, of int8 values; beside it stand the scales. Only in a file, and in
:meth:`QuantizedWeight.tensors`, are int4 codes two to a byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from sparsedeploy.errors import UserError
from sparsedeploy.formats import bitmask, nm
from sparsedeploy.formats.bitmask import BitmaskWeight, expect_tensor
from sparsedeploy.formats.config import BITS, GROUPS
from sparsedeploy.formats.nm import NMWeight
from sparsedeploy.grid import by_column
from sparsedeploy.plan import NM

_AGAIN = "The file is damaged: export the checkpoint again."

Codes: TypeAlias = BitmaskWeight | NMWeight


@dataclass(frozen=True)
class QuantizedWeight:
    """A packed weight of shape ``[rows, columns]`` whose element is its code times its group's scale.

    Attributes:
        codes: the packed codes; their values are int8, within -8 to 7 for 4 bits.
        scales: float16 ``[rows, ceil(columns / group)]``.
        bits: 8 or 4.
        group: columns that share a scale.
    """

    codes: Codes
    scales: torch.Tensor
    bits: int
    group: int

    @property
    def rows(self) -> int:
        return self.codes.rows

    @property
    def columns(self) -> int:
        return self.codes.columns

    @property
    def values(self) -> torch.Tensor:
        """The stored codes, int8."""
        return self.codes.values

    @property
    def count(self) -> int:
        return self.codes.count

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint stores, by the last part of the tensor's name."""
        stored = self.codes.tensors()
        if self.bits == 4:
            stored["weight_values"] = pack_nibbles(self.codes.values)
        return {**stored, "weight_scales": self.scales}


def pack(
    codes: torch.Tensor, scales: torch.Tensor, bits: int, group: int, pattern: NM | None = None
) -> QuantizedWeight:
    """Pack a matrix of codes. :func:`unpack_codes` gives it back exactly; codes of 0 are the ones left out.

    Args:
        codes: int8 ``[rows, columns]``, -8 to 7 for 4 bits.
        scales: float16 ``[rows, ceil(columns / group)]``.
        pattern: N:M; a bitmask without one.

    Raises:
        UserError: another dtype, shape, group or range, a scale that is not finite, or see :func:`.nm.pack`.
    """
    packed = bitmask.pack(codes) if pattern is None else nm.pack(codes, pattern)
    weight = QuantizedWeight(packed, scales, bits, group)
    _check_numbers(weight, "the weight")
    return weight


def unpack_codes(weight: QuantizedWeight) -> torch.Tensor:
    """The dense codes, int8 ``[rows, columns]``."""
    return _module(weight).unpack(weight.codes)


def unpack(weight: QuantizedWeight) -> torch.Tensor:
    """The dense weight, float32 ``[rows, columns]``: every code times its scale, exactly."""
    return unpack_codes(weight).float() * by_column(weight.scales, weight.group, weight.columns)


def check(weight: QuantizedWeight, name: str = "the weight") -> None:
    """Refuse tensors that disagree.

    Raises:
        UserError: naming the weight and what is wrong.
    """
    _module(weight).check(weight.codes, name)
    _check_numbers(weight, name)


def cut_rows(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Rows ``start`` to ``stop``."""
    codes = _module(weight).cut_rows(weight.codes, start, stop)
    return replace(weight, codes=codes, scales=weight.scales[start:stop])


def cut_columns(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Columns ``start`` to ``stop``, without unpacking.

    Raises:
        UserError: a bound inside of a group, or one at which the codes cannot be cut.
    """
    group = weight.group
    if start % group or (stop % group and stop != weight.columns):
        raise UserError(
            f"columns {start} to {stop} cannot be cut from groups of {group}",
            f"Shards must begin at multiples of {group} columns.",
        )
    codes = _module(weight).cut_columns(weight.codes, start, stop)
    return replace(weight, codes=codes, scales=weight.scales[:, start // group : -(-stop // group)].contiguous())


def join_rows(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights of one width, format, number of bits and group, one below the other.

    Raises:
        UserError: they differ in one of these.
    """
    first = parts[0]
    if any((part.bits, part.group, type(part.codes)) != (first.bits, first.group, type(first.codes)) for part in parts):
        raise UserError("quantised weights of different bits, groups or formats cannot be joined", _AGAIN)
    codes = _module(first).join_rows([part.codes for part in parts])
    return replace(first, codes=codes, scales=torch.cat([part.scales for part in parts]))


def pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    """int8 codes of -8 to 7, flattened, to uint8 ``[ceil(count / 2)]``: two's complement, the first in the low half."""
    halves = values.reshape(-1).view(torch.uint8) & 0x0F
    if halves.numel() % 2:
        halves = torch.cat([halves, halves.new_zeros(1)])
    return halves[0::2] | (halves[1::2] << 4)


def unpack_nibbles(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse of :func:`pack_nibbles`: int8 ``[count]``."""
    halves = torch.stack([packed << 4, packed & 0xF0], dim=1).reshape(-1)[:count].view(torch.int8)
    return halves >> 4


def _check_numbers(weight: QuantizedWeight, name: str) -> None:
    if weight.bits not in BITS or weight.group not in GROUPS:
        raise UserError(
            f"{name} has {weight.bits}-bit codes in groups of {weight.group}",
            f"Known: {BITS[0]} and {BITS[1]} bits, groups of {', '.join(map(str, GROUPS))}.",
        )
    values = weight.codes.values
    if values.dtype != torch.int8:
        raise UserError(f"{name}: the codes are {values.dtype}, not torch.int8", _AGAIN)
    groups = -(-weight.columns // weight.group)
    expect_tensor(name, "weight_scales", weight.scales, torch.float16, (weight.rows, groups))
    if not bool(torch.isfinite(weight.scales).all()):
        raise UserError(f"{name}: a scale is NaN or infinite", "Quantise the weight again.")
    if weight.bits == 4 and values.numel() and (int(values.min()) < -8 or int(values.max()) > 7):
        raise UserError(f"{name}: a 4-bit code is outside of -8 to 7", "Quantise the weight again.")


def _module(weight: QuantizedWeight) -> Any:
    return bitmask if isinstance(weight.codes, BitmaskWeight) else nm
