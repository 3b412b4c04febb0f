"""One weight in any format: the functions of :mod:`.bitmask`, :mod:`.nm` and :mod:`.quantized`, by what they get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from sparsedeploy.errors import UserError
from sparsedeploy.formats import bitmask, bits, nm, quantized
from sparsedeploy.formats.bitmask import BitmaskWeight
from sparsedeploy.formats.config import BITMASK, ModuleFormat
from sparsedeploy.formats.nm import NMWeight
from sparsedeploy.formats.quantized import QuantizedWeight
from sparsedeploy.plan import NM

_AGAIN = "The file is damaged: export the checkpoint again."

FloatWeight: TypeAlias = BitmaskWeight | NMWeight
PackedWeight: TypeAlias = FloatWeight | QuantizedWeight


def pack(weight: torch.Tensor, kind: str) -> FloatWeight:
    """Pack a weight ``[rows, columns]`` as ``bitmask`` or as N:M such as ``2:4``.

    Raises:
        UserError: see :func:`bitmask.pack` and :func:`nm.pack`.
    """
    return bitmask.pack(weight) if kind == BITMASK else nm.pack(weight, NM.parse(kind))


def unpack(packed: PackedWeight) -> torch.Tensor:
    """The dense weight ``[rows, columns]``; float32 where it is quantised."""
    return _module(packed).unpack(packed)


def check(packed: PackedWeight, name: str) -> None:
    """Refuse tensors that disagree.

    Raises:
        UserError: naming the module and what is wrong.
    """
    _module(packed).check(packed, name)


def cut_rows(packed: PackedWeight, start: int, stop: int) -> PackedWeight:
    """Rows ``start`` to ``stop``, without unpacking."""
    return _module(packed).cut_rows(packed, start, stop)


def cut_columns(packed: PackedWeight, start: int, stop: int) -> PackedWeight:
    """Columns ``start`` to ``stop``, without unpacking.

    Raises:
        UserError: bounds that the format cannot cut at.
    """
    return _module(packed).cut_columns(packed, start, stop)


def can_cut_columns(entry: ModuleFormat, width: int) -> bool:
    """Whether :func:`cut_columns` can cut a weight into shares of that many columns."""
    if entry.group is not None and width % entry.group:
        return False
    if entry.pattern is None:
        return width % 8 == 0
    return width % entry.pattern.m == 0 and width // entry.pattern.m * nm.code_bits(entry.pattern) % 8 == 0


def can_join(first: PackedWeight, second: PackedWeight) -> bool:
    """Whether :func:`join_rows` takes both."""
    return _kind(first) == _kind(second)


def join_rows(parts: Sequence[PackedWeight]) -> PackedWeight:
    """Weights of one width, format and dtype, one below the other, without unpacking."""
    return _module(parts[0]).join_rows(parts)


def describe(packed: PackedWeight) -> ModuleFormat:
    """Its entry in the checkpoint's ``quantization_config``."""
    if isinstance(packed, QuantizedWeight):
        return replace(describe(packed.codes), bits=packed.bits, group=packed.group)
    kind = BITMASK if isinstance(packed, BitmaskWeight) else str(packed.pattern)
    return ModuleFormat(kind, packed.rows, packed.columns, packed.count)


def size(packed: PackedWeight) -> int:
    """Bytes that its tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in packed.tensors().values())


def from_tensors(name: str, entry: ModuleFormat, tensors: Mapping[str, torch.Tensor]) -> PackedWeight:
    """Put a module's tensors together and check them.

    Args:
        entry: what the ``quantization_config`` says about the module.
        tensors: by the last part of their names, such as ``weight_values``; others are ignored.

    Raises:
        UserError: a tensor is missing, or they disagree with each other or with the entry.
    """
    missing = [part for part in tensor_layout(entry) if part not in tensors]
    if missing:
        raise UserError(f"{name} lacks its tensor {missing[0]}", "Export the checkpoint again.")
    found = tensors["weight_values"].numel()
    stored = entry.values if entry.bits != 4 else -(-entry.values // 2)
    if found != stored:
        raise UserError(
            f"{name}: weight_values holds {found} values, the quantization_config says {stored}",
            _AGAIN,
        )
    if entry.bits is None and tensors["weight_values"].dtype == torch.int8:
        raise UserError(f"{name} holds int8 codes, the quantization_config has no bits and group for it", _AGAIN)
    packed = assemble(entry, tensors)
    check(packed, name)
    return packed


def assemble(entry: ModuleFormat, tensors: Mapping[str, torch.Tensor]) -> PackedWeight:
    """Put tensors together that :func:`from_tensors` has checked before."""
    values = tensors["weight_values"]
    if entry.bits is not None and entry.group is not None:
        plain = replace(entry, bits=None, group=None)
        if entry.bits == 4:
            shape = tensor_layout(plain)["weight_values"][0]
            values = quantized.unpack_nibbles(values, entry.values).view(shape)
        codes = assemble(plain, {**tensors, "weight_values": values})
        if isinstance(codes, QuantizedWeight):
            raise TypeError("codes cannot be quantised again")
        return QuantizedWeight(codes, tensors["weight_scales"], entry.bits, entry.group)
    if entry.pattern is None:
        return BitmaskWeight(entry.rows, entry.columns, tensors["weight_mask"], values, tensors["weight_offsets"])
    return NMWeight(entry.rows, entry.columns, entry.pattern, values, tensors["weight_positions"])


def tensor_layout(entry: ModuleFormat) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shape and dtype of a module's tensors, by the last part of their names; dtype None is the values'."""
    rows, columns, pattern = entry.rows, entry.columns, entry.pattern
    if entry.bits is not None and entry.group is not None:
        layout = tensor_layout(replace(entry, bits=None, group=None))
        shape = layout["weight_values"][0] if entry.bits == 8 else (-(-entry.values // 2),)
        layout["weight_values"] = (shape, torch.int8 if entry.bits == 8 else torch.uint8)
        return {**layout, "weight_scales": ((rows, -(-columns // entry.group)), torch.float16)}
    if pattern is None:
        return {
            "weight_mask": ((rows, -(-columns // 8)), torch.uint8),
            "weight_values": ((entry.values,), None),
            "weight_offsets": ((rows + 1,), torch.int32),
        }
    groups = columns // pattern.m
    return {
        "weight_values": ((rows, groups * pattern.n), None),
        "weight_positions": ((rows, bits.field_bytes(groups, nm.code_bits(pattern))), torch.uint8),
    }


def smallest_kind(weight: torch.Tensor) -> str | None:
    """The format in which a weight takes fewest bytes; None where none is smaller than the dense weight.

    N:M wins over a bitmask of the same size: it needs no offsets and its groups are even.
    """
    kept = weight != 0
    rows, columns = weight.shape
    value_bits = weight.element_size() * 8
    sizes = {BITMASK: rows * (columns + 32) + int(kept.sum()) * value_bits}
    for m in nm.GROUP_SIZES:
        if columns % m == 0 and columns:
            n = max(1, int(kept.view(rows, columns // m, m).sum(dim=2).max())) if rows else 1
            pattern = NM(n, m)
            sizes[str(pattern)] = rows * (columns // m) * (n * value_bits + nm.code_bits(pattern))
    dense = rows * columns * value_bits
    smallest = min(sizes, key=lambda kind: (sizes[kind], kind == BITMASK))
    return smallest if sizes[smallest] < dense else None


def _kind(packed: PackedWeight) -> tuple[object, ...]:
    if isinstance(packed, QuantizedWeight):
        return (packed.bits, packed.group, *_kind(packed.codes))
    pattern = None if isinstance(packed, BitmaskWeight) else packed.pattern
    return (pattern, packed.columns, packed.values.dtype)


def _module(packed: PackedWeight) -> Any:
    if isinstance(packed, QuantizedWeight):
        return quantized
    return bitmask if isinstance(packed, BitmaskWeight) else nm
