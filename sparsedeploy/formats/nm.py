"""The ``n:m`` format: N values of every M consecutive columns, and where in the group they stand.

A group's position code is either N positions of log2(M) bits, lowest first (``2:4``: 4 bits, in the order of the
hardware's 2:4 metadata before its tile-wise reordering; ``2:8``: 6 bits), or, where that is shorter, M mask bits
(``4:8``). Every row has the same size, so no offsets are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import torch

from sparsedeploy.errors import UserError
from sparsedeploy.formats import bits
from sparsedeploy.formats.bitmask import BitmaskWeight, check_matrix, check_padding, expect_tensor, offsets_of
from sparsedeploy.masks import pack_bits, unpack_bits
from sparsedeploy.plan import NM

GROUP_SIZES = (4, 8)
_AGAIN = "The file is damaged: export the checkpoint again."


@dataclass(frozen=True)
class NMWeight:
    """A packed weight of shape ``[rows, columns]`` with ``pattern.n`` values in every ``pattern.m`` columns.

    Attributes:
        values: bfloat16, float16 or float32 ``[rows, columns / M * N]``, in the order of their columns.
        positions: uint8 ``[rows, ceil(columns / M * code_bits / 8)]``, the groups' codes from the lowest bit up.
    """

    rows: int
    columns: int
    pattern: NM
    values: torch.Tensor
    positions: torch.Tensor

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return self.columns // self.pattern.m

    @property
    def count(self) -> int:
        return self.values.numel()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint stores, by the last part of the tensor's name."""
        return {"weight_values": self.values, "weight_positions": self.positions}


def stores_positions(pattern: NM) -> bool:
    """Whether a group's code is a list of positions, as against M mask bits."""
    return pattern.n * _position_bits(pattern) <= pattern.m and pattern.n < pattern.m


def code_bits(pattern: NM) -> int:
    """Bits of a group's position code."""
    return pattern.n * _position_bits(pattern) if stores_positions(pattern) else pattern.m


def check_pattern(pattern: NM) -> None:
    """Refuse a group size that the format does not have.

    Raises:
        UserError: M is neither 4 nor 8.
    """
    if pattern.m not in GROUP_SIZES:
        raise UserError(f"pattern {pattern} has no packed format of its own", "Pack it as bitmask.")


def pack(weight: torch.Tensor, pattern: NM) -> NMWeight:
    """Pack a weight ``[rows, columns]`` with at most N non-zeros in every group of M columns.

    Groups with fewer keep zeros at their lowest free positions. Round trip as for :func:`.bitmask.pack`.

    Raises:
        UserError: another pattern, a width that M does not divide, or a group with more than N non-zeros.
    """
    check_pattern(pattern)
    check_matrix(weight)
    rows, columns = weight.shape
    n, m = pattern.n, pattern.m
    if columns % m:
        raise UserError(f"{columns} columns are not whole groups of {m}", "Pack it as bitmask.")
    integers = bits.as_integers(weight.contiguous())
    masks = bits.unpack_fields(pack_bits(weight != 0), m, columns // m)
    codes = _code_of_mask(pattern).to(weight.device)[masks.int()]
    if bool((codes < 0).any()):
        raise UserError(f"a group of {m} weights has more than {n} non-zeros", f"Prune with --pattern {pattern}.")
    positions = bits.pack_fields(codes.to(torch.uint8), code_bits(pattern))
    values = torch.empty(rows, columns // m * n, dtype=integers.dtype, device=weight.device)
    packed = NMWeight(rows, columns, pattern, values.view(weight.dtype), positions)

    def select(start: int, stop: int) -> None:
        values[start:stop] = integers[start:stop][_kept(packed, start, stop)].view(stop - start, -1)

    bits.for_row_blocks(rows, weight.device, select)
    return packed


def unpack(packed: NMWeight) -> torch.Tensor:
    """The dense weight ``[rows, columns]``. The packed one must have passed :func:`check`."""
    source = bits.as_integers(packed.values)
    dense = torch.zeros(packed.rows, packed.columns, dtype=source.dtype, device=source.device)

    def expand(start: int, stop: int) -> None:
        dense[start:stop].masked_scatter_(_kept(packed, start, stop), source[start:stop])

    bits.for_row_blocks(packed.rows, source.device, expand)
    return dense.view(packed.values.dtype)


def check(packed: NMWeight, name: str = "the weight") -> None:
    """Refuse tensors that disagree, before anything reads them.

    Raises:
        UserError: naming the weight and what is wrong: a shape, a dtype or a position.
    """
    pattern = packed.pattern
    check_pattern(pattern)
    if packed.columns % pattern.m:
        raise UserError(f"{name}: {packed.columns} columns are not whole groups of {pattern.m}", _AGAIN)
    used = packed.groups * code_bits(pattern)
    bits.check_dtype(name, packed.values.dtype)
    shape = (packed.rows, packed.groups * pattern.n)
    expect_tensor(name, "weight_values", packed.values, packed.values.dtype, shape)
    expect_tensor(name, "weight_positions", packed.positions, torch.uint8, (packed.rows, -(-used // 8)))
    check_padding(name, "weight_positions", packed.positions, used)
    codes = bits.unpack_fields(packed.positions, code_bits(pattern), packed.groups)
    if packed.rows and packed.groups and bool((_mask_of_code(pattern).to(codes.device)[codes.int()] == 0).any()):
        raise UserError(f"{name}: weight_positions has a group that does not keep {pattern.n} of {pattern.m}", _AGAIN)


def cut_rows(packed: NMWeight, start: int, stop: int) -> NMWeight:
    """Rows ``start`` to ``stop``, as views."""
    return NMWeight(
        stop - start, packed.columns, packed.pattern, packed.values[start:stop], packed.positions[start:stop]
    )


def cut_columns(packed: NMWeight, start: int, stop: int) -> NMWeight:
    """Columns ``start`` to ``stop``, without unpacking.

    Raises:
        UserError: a bound inside of a group, or of a byte of the position codes.
    """
    n, m = packed.pattern.n, packed.pattern.m
    width = code_bits(packed.pattern)
    inside = stop != packed.columns and (stop % m or stop // m * width % 8)
    if start % m or start // m * width % 8 or inside:
        raise UserError(
            f"columns {start} to {stop} cannot be cut from {packed.pattern} weights",
            f"Shards must begin at multiples of {m * 8} columns.",
        )
    first, last = start // m, stop // m
    return NMWeight(
        packed.rows,
        stop - start,
        packed.pattern,
        packed.values[:, first * n : last * n].contiguous(),
        packed.positions[:, first * width // 8 : -(-last * width // 8)].contiguous(),
    )


def join_rows(parts: Sequence[NMWeight]) -> NMWeight:
    """Weights of the same width and pattern, one below the other.

    Raises:
        UserError: widths, patterns or dtypes differ.
    """
    first = parts[0]
    kind = (first.columns, first.pattern, first.values.dtype)
    if any((part.columns, part.pattern, part.values.dtype) != kind for part in parts):
        raise UserError("packed weights of different widths, patterns or dtypes cannot be joined", _AGAIN)
    return NMWeight(
        sum(part.rows for part in parts),
        first.columns,
        first.pattern,
        torch.cat([part.values for part in parts]),
        torch.cat([part.positions for part in parts]),
    )


def to_bitmask(packed: NMWeight) -> BitmaskWeight:
    """The same weight with one mask bit for every column; the values stay where they are.

    Exactly as large for 2:4 and 4:8 (5 % larger for 2:8), and simpler to expand for kernels that read masks.
    """
    masks = group_masks(packed, 0, packed.rows)
    counts = torch.full((packed.rows,), packed.values.shape[1], dtype=torch.int64, device=masks.device)
    return BitmaskWeight(
        packed.rows,
        packed.columns,
        bits.pack_fields(masks, packed.pattern.m),
        packed.values.reshape(-1),
        offsets_of(counts),
    )


def group_masks(packed: NMWeight, start: int, stop: int) -> torch.Tensor:
    """The M mask bits of every group of rows ``start`` to ``stop``, uint8 ``[rows, groups]``."""
    codes = bits.unpack_fields(packed.positions[start:stop], code_bits(packed.pattern), packed.groups)
    return _mask_of_code(packed.pattern).to(codes.device)[codes.int()]


def _kept(packed: NMWeight, start: int, stop: int) -> torch.Tensor:
    """Where the values of rows ``start`` to ``stop`` stand, bool ``[rows, columns]``."""
    return unpack_bits(bits.pack_fields(group_masks(packed, start, stop), packed.pattern.m), packed.columns)


def _position_bits(pattern: NM) -> int:
    return pattern.m.bit_length() - 1


@lru_cache(maxsize=16)
def _mask_of_code(pattern: NM) -> torch.Tensor:
    """Code -> mask bits, uint8 ``[2 ** code_bits]``; 0 for codes that no group has."""
    table = torch.zeros(1 << code_bits(pattern), dtype=torch.uint8)
    for places in combinations(range(pattern.m), pattern.n):
        mask = sum(1 << place for place in places)
        table[_code(pattern, places)] = mask
    return table


@lru_cache(maxsize=16)
def _code_of_mask(pattern: NM) -> torch.Tensor:
    """Mask bits of the non-zeros -> code of the group, int16 ``[2 ** M]``; -1 for more than N.

    Fewer than N are filled up with the lowest free positions.
    """
    table = torch.full((1 << pattern.m,), -1, dtype=torch.int16)
    for mask in range(1 << pattern.m):
        taken = [place for place in range(pattern.m) if mask >> place & 1]
        free = [place for place in range(pattern.m) if not mask >> place & 1]
        if len(taken) <= pattern.n:
            table[mask] = _code(pattern, tuple(sorted(taken + free[: pattern.n - len(taken)])))
    return table


def _code(pattern: NM, places: tuple[int, ...]) -> int:
    if not stores_positions(pattern):
        return sum(1 << place for place in places)
    width = _position_bits(pattern)
    return sum(place << (width * index) for index, place in enumerate(places))
