"""The tensors of a safetensors folder: where each one lies, read one at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

import torch

from sparsedeploy.errors import UserError
from sparsedeploy.models.fingerprint import weight_files

INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


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
        if self.kind not in _DTYPES:
            raise UserError(
                f"tensor {self.name} has type {self.kind}, which cannot be pruned",
                "Use an unquantised checkpoint (float32, float16 or bfloat16).",
            )
        return _DTYPES[self.kind]


class TensorFiles:
    """All tensors of a model folder by name.

    Raises:
        UserError: an index that names a missing shard or tensor, a truncated or corrupt shard, or one tensor in two.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = weight_files(folder)
        self._tensors: dict[str, StoredTensor] = {}
        check_index(folder)
        for shard in self.shards:
            for tensor in read_header(shard):
                if other := self._tensors.get(tensor.name):
                    raise UserError(
                        f"tensor {tensor.name} is in two shards: {other.shard.name} and {shard.name}",
                        "Remove the stray shard.",
                    )
                self._tensors[tensor.name] = tensor

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

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

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
            "Save the model anew with transformers' save_pretrained, then use that folder.",
        )

    def read(self, tensors: Iterable[StoredTensor]) -> dict[str, torch.Tensor]:
        """Read tensors into memory of their own, by stored name.

        Raises:
            UserError: a shard that became unreadable.
        """
        wanted: dict[Path, list[StoredTensor]] = {}
        for tensor in tensors:
            wanted.setdefault(tensor.shard, []).append(tensor)
        result = {}
        for shard, stored in wanted.items():
            try:
                with open(shard, "rb", buffering=0) as file:
                    result.update({tensor.name: _read_tensor(file, tensor) for tensor in stored})
            except OSError as error:
                raise _corrupt(shard, str(error)) from error
        return result

    def read_rows(self, stored: StoredTensor, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        """A part of a tensor, from the byte ``start`` of its shard, in the stored type.

        Raises:
            UserError: a shard that became unreadable.
        """
        end = start + torch.Size(shape).numel() * stored.dtype.itemsize
        part = replace(stored, shape=shape, start=start, end=end)
        return self.read([part])[part.name]


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

    Raises:
        UserError: a truncated or corrupt file.
    """
    try:
        size = shard.stat().st_size
        with open(shard, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > size - 8:
                raise ValueError(f"its header of {length} bytes does not fit in {size}")
            header = json.loads(file.read(length))
        base = 8 + length
        tensors = [
            StoredTensor(
                name,
                shard,
                entry["dtype"],
                tuple(entry["shape"]),
                base + entry["data_offsets"][0],
                base + entry["data_offsets"][1],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise _corrupt(shard, str(error)) from error
    tensors.sort(key=lambda tensor: tensor.start)
    if max((tensor.end for tensor in tensors), default=base) != size:
        raise _corrupt(
            shard, f"its tensors end at byte {max((t.end for t in tensors), default=base)}, the file at {size}"
        )
    return tensors


def _corrupt(shard: Path, reason: str) -> UserError:
    return UserError(f"weight file {shard} is truncated or corrupt ({reason})", "Download it again.")


def check_index(folder: Path) -> None:
    """Make sure that every shard of the index, where there is one, is there.

    Raises:
        UserError: a broken index, or a missing shard.
    """
    path = folder / INDEX
    if not path.is_file():
        return
    try:
        named = set(json.loads(path.read_text())["weight_map"].values())
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a safetensors index ({error})", "Download it again.") from error
    missing = sorted(name for name in named if not (folder / name).is_file())
    if missing:
        raise UserError(f"{path} names {missing[0]}, which is missing", "Download the missing shard.")
