"""The tensors of a safetensors folder: where each one lies, read one at a time."""

from __future__ import annotations

import math
import os
from collections.abc import ItemsView, Iterable, Set
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

import torch

from sparsedeploy.errors import UserError
from sparsedeploy.linear_algebra import all_finite
from sparsedeploy.models.weight_files import INDEX, read_index, weight_files
from sparsedeploy.reading import Fields, open_regular, parse_object

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Of buffers that are kept as they are, such as a batch norm's counter; never of a weight.
_COUNTERS = {"I64": torch.int64, "BOOL": torch.bool}
# How tensors beside a quantised or packed weight are called.
_QUANTISED = (
    "qweight",
    "qzeros",
    "weight_scale",
    "weight_zero_point",
    "weight_packed",
    "weight_values",
    "weight_shape",
)
# Bits of an element, for every type of the format.
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
_HEADER_LIMIT = 100_000_000
_AGAIN = "Download it again."


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a shard.

    Attributes:
        kind: the safetensors type name, such as ``BF16``.
        start, end: byte range in the file.
    """

    name: str
    shard: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def dtype(self) -> torch.dtype:
        """The torch type.

        Raises:
            UserError: a type that cannot be pruned (integers, fp8).
        """
        if self.kind in _COUNTERS and not self.name.endswith("weight"):
            return _COUNTERS[self.kind]
        if self.kind not in _DTYPES:
            raise UserError(
                f"tensor {self.name} has type {self.kind}, which cannot be pruned",
                "Use an unquantised checkpoint (float32, float16 or bfloat16).",
            )
        return _DTYPES[self.kind]

    @property
    def is_float(self) -> bool:
        """Whether it is of a type that a weight is computed in."""
        return self.kind in _DTYPES

    @property
    def is_quantised(self) -> bool:
        """Whether it is a weight in integers or small floats, or belongs to one, such as its scales."""
        small = self.kind not in _DTYPES and self.kind not in _COUNTERS
        return small or self.name.rpartition(".")[2].startswith(_QUANTISED)


class TensorFiles:
    """All tensors of a model folder by name.

    Raises:
        UserError: an index that names a missing shard or tensor, a truncated or corrupt shard, or one tensor in two.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = weight_files(folder)
        self._tensors: dict[str, StoredTensor] = {}
        for shard in self.shards:
            for tensor in read_header(shard):
                if other := self._tensors.get(tensor.name):
                    raise UserError(
                        f"tensor {tensor.name} is in two shards: {other.shard.name} and {shard.name}",
                        "Write the model again: its shards overlap.",
                    )
                self._tensors[tensor.name] = tensor
        for name, shard_name in (read_index(folder) or {}).items():
            if name not in self._tensors or self._tensors[name].shard.name != shard_name:
                raise UserError(f"{folder / INDEX} names {name} in {shard_name}, which lacks it", _AGAIN)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.stat().st_size for shard in self.shards)

    @property
    def names(self) -> list[str]:
        """The stored names of all tensors."""
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def items(self) -> ItemsView[str, StoredTensor]:
        """Name and place of every tensor."""
        return self._tensors.items()

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def check_others(self, known: Set[str]) -> None:
        """Look for NaN and infinity in every tensor that is not among the known ones, one at a time.

        Raises:
            UserError: naming the first.
        """
        for name, tensor in self._tensors.items():
            if name not in known and tensor.kind in _DTYPES:
                self.read([tensor])

    def locate(self, parameter: str) -> StoredTensor:
        """The stored tensor of a model parameter; checkpoints of a bare base model lack the name's first part.

        Raises:
            UserError: the files hold none.
        """
        for name in (parameter, parameter.partition(".")[2]):
            if name in self._tensors:
                return self._tensors[name]
        raise UserError(
            f"{self.folder} stores no tensor for {parameter}",
            "Check that config.json and the weights belong together, or get a complete copy of the model.",
        )

    def read(self, tensors: Iterable[StoredTensor]) -> dict[str, torch.Tensor]:
        """Read tensors into memory of their own, by stored name.

        Raises:
            UserError: a shard that became unreadable, or a value that is not finite.
        """
        wanted: dict[Path, list[StoredTensor]] = {}
        for tensor in tensors:
            wanted.setdefault(tensor.shard, []).append(tensor)
        result = {}
        for shard, stored in wanted.items():
            try:
                with open(shard, "rb", buffering=0) as file:
                    for tensor in stored:
                        result[tensor.name] = _read_tensor(file, tensor)
                        check_tensor(tensor.name, result[tensor.name])
            except OSError as error:
                raise _corrupt(shard, str(error)) from error
        return result

    def read_rows(self, stored: StoredTensor, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        """A part of a tensor, from the byte ``start`` of its shard, in the stored type.

        Raises:
            UserError: a shard that became unreadable, or a value that is not finite.
        """
        end = start + torch.Size(shape).numel() * stored.dtype.itemsize
        part = replace(stored, shape=shape, start=start, end=end)
        return self.read([part])[part.name]


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Refuse NaN and infinity in a stored tensor.

    Raises:
        UserError: naming it.
    """
    if tensor.is_floating_point() and tensor.numel() and tensor.element_size() > 1 and not all_finite(tensor):
        raise UserError(f"{name} holds NaN or infinite values", "Get an intact copy of the checkpoint.")


def _read_tensor(file: FileIO, stored: StoredTensor) -> torch.Tensor:
    """Read straight into place: no mapped pages, which would count as memory of ours, and no second copy."""
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    place = tensor.view(-1).view(torch.uint8).numpy().data
    if len(place) != stored.end - stored.start:
        raise _corrupt(stored.shard, f"{stored.name} has {stored.end - stored.start} bytes for {len(place)}")
    file.seek(stored.start)
    while place:
        count = file.readinto(place)
        if not count:
            raise _corrupt(stored.shard, f"it ends within {stored.name}")
        place = place[count:]
    return tensor


def read_header(shard: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes.

    As strict as the library: a header of at most 100 MB, known types, sizes that follow from shape and type, and
    tensors that cover the rest of the file without a hole or an overlap.

    Raises:
        UserError: a truncated or corrupt file, or none.
    """
    with open_regular(shard, fix=_AGAIN) as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > size - 8:
            raise _corrupt(shard, f"its header of {length} bytes does not fit in {size}")
        if length > _HEADER_LIMIT:
            raise _corrupt(shard, f"its header has {length} bytes, more than {_HEADER_LIMIT}")
        text = file.read(length)
    where = f"the header of weight file {shard}"
    header = Fields(parse_object(text, where, fix=_AGAIN), where, _AGAIN)
    if header.values.get("__metadata__") is not None:
        about = header.fields("__metadata__")
        for key in about.values:
            about.text(key)
    base = 8 + length
    tensors = [_entry(header.fields(name), name, shard, base) for name in header.values if name != "__metadata__"]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    end = base
    for tensor in tensors:
        if tensor.start != end:
            raise _corrupt(shard, f"{tensor.name} starts at byte {tensor.start}, not at {end} where the last one ends")
        end = tensor.end
    if end != size:
        raise _corrupt(shard, f"its tensors end at byte {end}, the file at {size}")
    return tensors


def _entry(fields: Fields, name: str, shard: Path, base: int) -> StoredTensor:
    kind, offsets = fields.text("dtype"), fields.items("data_offsets")
    shape = fields.items("shape")
    if kind not in _BITS:
        raise _corrupt(shard, f"{name} has the unknown type {kind[:40]!r}")
    for number in (*shape, *offsets):
        if type(number) is not int or not 0 <= number < 2**63:
            raise _corrupt(shard, f"{name} has a shape or offset that is not a natural number")
    bits = math.prod(shape) * _BITS[kind]
    if len(offsets) != 2 or bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise _corrupt(shard, f"{name} of type {kind} and shape {shape[:8]} does not fill its bytes {offsets[:2]}")
    return StoredTensor(name, shard, kind, tuple(shape), base + offsets[0], base + offsets[1])


def _corrupt(shard: Path, reason: str) -> UserError:
    return UserError(f"weight file {shard} is truncated or corrupt ({reason})", _AGAIN)
