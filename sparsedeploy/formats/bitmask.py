"""The ``bitmask`` format: one bit for every weight, and the non-zero values row after row.

At sparsity s a 16-bit weight takes 1/16 + (1 - s) of its dense size, whatever the positions of its zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsedeploy.errors import UserError
from sparsedeploy.formats import bits
from sparsedeploy.masks import pack_bits, unpack_bits

LARGEST_COUNT = 2**31 - 1
_AGAIN = "The file is damaged: export the checkpoint again."


@dataclass(frozen=True)
class BitmaskWeight:
    """A packed weight of shape ``[rows, columns]``.

    Attributes:
        mask: uint8 ``[rows, ceil(columns / 8)]``; bit ``j`` of byte ``i`` is set where column ``8 i + j`` is not zero.
        values: the non-zero weights, row after row, bfloat16, float16 or float32 ``[count]``.
        offsets: int32 ``[rows + 1]``; the values of row ``r`` are ``values[offsets[r] : offsets[r + 1]]``.
    """

    rows: int
    columns: int
    mask: torch.Tensor
    values: torch.Tensor
    offsets: torch.Tensor

    @property
    def count(self) -> int:
        return self.values.numel()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint stores, by the last part of the tensor's name."""
        return {"weight_mask": self.mask, "weight_values": self.values, "weight_offsets": self.offsets}


def pack(weight: torch.Tensor) -> BitmaskWeight:
    """Pack a weight ``[rows, columns]``. :func:`unpack` gives every value back bit for bit; only -0.0 becomes 0.0.

    Raises:
        UserError: not a matrix, another dtype, or more than 2^31 - 1 values.
    """
    check_matrix(weight)
    integers = bits.as_integers(weight.contiguous())
    rows, columns = weight.shape
    kept = weight != 0
    counts = kept.sum(dim=1)
    offsets = offsets_of(counts)
    values = torch.empty(int(counts.sum()), dtype=integers.dtype, device=weight.device)
    bounds = offsets.tolist()

    def select(start: int, stop: int) -> None:
        values[bounds[start] : bounds[stop]] = integers[start:stop][kept[start:stop]]

    bits.for_row_blocks(rows, weight.device, select)
    return BitmaskWeight(rows, columns, pack_bits(kept), values.view(weight.dtype), offsets)


def unpack(packed: BitmaskWeight) -> torch.Tensor:
    """The dense weight ``[rows, columns]``. The packed one must have passed :func:`check`."""
    source = bits.as_integers(packed.values)
    dense = torch.zeros(packed.rows, packed.columns, dtype=source.dtype, device=source.device)
    bounds = packed.offsets.tolist()

    def expand(start: int, stop: int) -> None:
        kept = unpack_bits(packed.mask[start:stop], packed.columns)
        dense[start:stop].masked_scatter_(kept, source[bounds[start] : bounds[stop]])

    bits.for_row_blocks(packed.rows, source.device, expand)
    return dense.view(packed.values.dtype)


def check(packed: BitmaskWeight, name: str = "the weight") -> None:
    """Refuse tensors that disagree, before anything reads them by their offsets.

    Raises:
        UserError: naming the weight and what is wrong: a shape, a dtype, an offset, a count or a mask bit.
    """
    rows, columns, mask, values, offsets = packed.rows, packed.columns, packed.mask, packed.values, packed.offsets
    expect_tensor(name, "weight_mask", mask, torch.uint8, (rows, -(-columns // 8)))
    expect_tensor(name, "weight_offsets", offsets, torch.int32, (rows + 1,))
    bits.check_dtype(name, values.dtype)
    if values.dim() != 1:
        raise UserError(f"{name}: weight_values has shape {tuple(values.shape)}, not one dimension", _AGAIN)
    check_padding(name, "weight_mask", mask, columns)
    expected = offsets_of(bits.count_bits(mask))
    wrong = (expected != offsets).nonzero()
    if wrong.numel():
        row = int(wrong[0])
        raise UserError(
            f"{name}: weight_offsets has {int(offsets[row])} for row {row}, the mask has {int(expected[row])} values "
            "before it",
            _AGAIN,
        )
    if int(offsets[-1]) != values.numel():
        raise UserError(
            f"{name}: weight_values holds {values.numel()} values, mask and offsets need {int(offsets[-1])}", _AGAIN
        )


def cut_rows(packed: BitmaskWeight, start: int, stop: int) -> BitmaskWeight:
    """Rows ``start`` to ``stop``, without unpacking; the tensors are views where they can be."""
    offsets = packed.offsets[start : stop + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    return BitmaskWeight(
        stop - start, packed.columns, packed.mask[start:stop], packed.values[first:last], offsets - first
    )


def cut_columns(packed: BitmaskWeight, start: int, stop: int) -> BitmaskWeight:
    """Columns ``start`` to ``stop``, without unpacking: mask bytes are sliced and each row's values moved up.

    Raises:
        UserError: a bound inside of a mask byte.
    """
    if start % 8 or (stop % 8 and stop != packed.columns):
        raise UserError(
            f"columns {start} to {stop} cannot be cut from a bitmask", "Shards must begin at multiples of 8 columns."
        )
    first, last = start // 8, -(-stop // 8)
    mask = packed.mask[:, first:last].contiguous()
    begin = packed.offsets[:-1].long() + bits.count_bits(packed.mask[:, :first])
    counts = bits.count_bits(mask)
    offsets = offsets_of(counts)
    # Position of every kept value: where its row's part begins, plus its place in that part.
    shift = begin - offsets[:-1].long()
    source = torch.repeat_interleave(shift, counts) + torch.arange(int(offsets[-1]), device=shift.device)
    return BitmaskWeight(packed.rows, stop - start, mask, packed.values[source], offsets)


def join_rows(parts: Sequence[BitmaskWeight]) -> BitmaskWeight:
    """Weights of the same width, one below the other, without unpacking.

    Raises:
        UserError: widths or dtypes differ, or there are too many values.
    """
    first = parts[0]
    if any(part.columns != first.columns or part.values.dtype != first.values.dtype for part in parts):
        raise UserError("packed weights of different widths or dtypes cannot be joined", _AGAIN)
    counts = torch.cat([part.offsets.diff() for part in parts])
    return BitmaskWeight(
        sum(part.rows for part in parts),
        first.columns,
        torch.cat([part.mask for part in parts]),
        torch.cat([part.values for part in parts]),
        offsets_of(counts),
    )


def check_matrix(weight: torch.Tensor) -> None:
    """Refuse what is not a matrix of a dtype that can be packed.

    Raises:
        UserError: another number of dimensions or dtype.
    """
    if weight.dim() != 2:
        raise UserError(f"a weight of shape {tuple(weight.shape)} cannot be packed", "Give a matrix [rows, columns].")
    bits.check_dtype("the weight", weight.dtype)


def expect_tensor(name: str, part: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Refuse another dtype or shape than the format has.

    Raises:
        UserError: naming the module, the tensor and both.
    """
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise UserError(
            f"{name}: {part} is {tensor.dtype} {tuple(tensor.shape)}, the format has {dtype} {shape} here", _AGAIN
        )


def check_padding(name: str, part: str, packed: torch.Tensor, used: int) -> None:
    """Refuse bits that are set beyond the last one in use.

    Raises:
        UserError: naming the module and the tensor.
    """
    if used % 8 and packed.numel() and int((packed[:, -1] >> (used % 8)).max()):
        raise UserError(f"{name}: {part} has bits set beyond its last column", _AGAIN)


def offsets_of(counts: torch.Tensor) -> torch.Tensor:
    """int32 ``[rows + 1]``: the sums of the counts before each row, and of all.

    Raises:
        UserError: more values than 32 bits count.
    """
    total = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, dim=0, out=total[1:])
    if int(total[-1]) > LARGEST_COUNT:
        raise UserError(f"a weight with {int(total[-1])} values is too large for 32-bit offsets", "Split the module.")
    return total.int()
