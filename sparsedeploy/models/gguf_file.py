"""Look into a GGUF file before anything loads it: architecture, tensors, quantisation, and whether it is whole.

The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from sparsedeploy.errors import UserError
from sparsedeploy.reading import open_regular

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_LARGEST_ALIGNMENT = 1 << 20
_SOUND = "Download it again."


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: its shape in torch's order, its type by ggml's name, and where it lies in the file, in bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    size: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class GGUFFile:
    """The header of a file that is whole; arrays of strings are left out of the metadata."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def types(self) -> dict[str, int]:
        """Type -> number of tensors, the most frequent first."""
        return dict(Counter(tensor.type for tensor in self.tensors).most_common())

    def tensor(self, name: str) -> GGUFTensor | None:
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def read_gguf(path: Path) -> GGUFFile:
    """Read the header and check that every tensor lies inside the file and can be dequantised.

    Raises:
        UserError: no GGUF file, a part of one, a damaged or truncated one, a quantisation that is not known here, or
            the package ``gguf`` is not installed.
    """
    with open_regular(path, fix="Give a GGUF file.") as file:
        length = path.stat().st_size
        if length < 4 or file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file", "Give a file whose first four bytes are GGUF.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                header = _parse(path, _Reader(content))
            except _DamagedError as error:
                raise UserError(f"{path} is damaged: {error}", _SOUND) from error
    parts = header.metadata.get("split.count", 0)
    if not isinstance(parts, int):
        raise UserError(f"{path} is damaged: its split.count is not a number", _SOUND)
    if parts > 1:
        raise UserError(f"{path} is one part of several", "Merge them first: llama-gguf-split --merge.")
    if not header.tensors:
        raise UserError(f"{path} holds no tensors", "Give the file of a whole model.")
    said = header.metadata.get(f"{header.architecture}.block_count")
    blocks = len({found[1] for tensor in header.tensors if (found := re.match(r"blk\.(\d+)\.", tensor.name))})
    if isinstance(said, int) and said > blocks:
        raise UserError(f"{path} is damaged: it says that it has {said:,} blocks, and has {blocks}", _SOUND)
    for tensor in header.tensors:
        if (end := tensor.start + tensor.size) > length:
            raise UserError(f"{path} is truncated: {tensor.name} ends at byte {end:,}, the file has {length:,}", _SOUND)
    placed = sorted(header.tensors, key=lambda tensor: tensor.start)
    for one, two in pairwise(placed):
        if one.start + one.size > two.start:
            raise UserError(f"{path} is damaged: {one.name} and {two.name} share bytes", _SOUND)
    return header


class _DamagedError(Exception):
    """What is wrong with the bytes."""


class _Reader:
    """Reads little-endian values one after the other and never past the end."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self.at = content, 4

    def bytes(self, count: int) -> bytes:
        if count > len(self._content) - self.at:
            raise _DamagedError(f"its header ends at byte {len(self._content):,}, {count:,} more bytes should follow")
        self.at += count
        return self._content[self.at - count : self.at]

    def numbers(self, kind: str, count: int = 1) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{kind}", self.bytes(count * struct.calcsize(f"<{kind}")))

    def number(self, kind: str) -> Any:
        return self.numbers(kind)[0]

    def text(self) -> str:
        try:
            return self.bytes(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise _DamagedError(f"the text before byte {self.at:,} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        """A metadata value; None for an array of strings."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise _DamagedError(f"a value of type {kind} before byte {self.at:,}")
        of, count = self.number("I"), self.number("Q")
        if of in _SCALARS:
            return list(self.numbers(_SCALARS[of], count))
        if of != _STRING:
            raise _DamagedError(f"an array of type {of} before byte {self.at:,}")
        for _ in range(count):
            self.bytes(self.number("Q"))
        return None


def _parse(path: Path, reader: _Reader) -> GGUFFile:
    version, tensor_count, value_count = reader.number("I"), reader.number("Q"), reader.number("Q")
    if version not in _VERSIONS:
        raise UserError(f"{path} is GGUF version {version}", "Versions 2 and 3 can be read; convert the model again.")
    metadata = {}
    for _ in range(value_count):
        key = reader.text()
        if key in metadata:
            raise _DamagedError(f"it has two values of {key}")
        metadata[key] = reader.value(reader.number("I"))
    if not isinstance(metadata.get("general.architecture"), str):
        raise _DamagedError("it does not name its architecture")
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise _DamagedError(f"an alignment of {str(alignment)[:40]}")
    entries = list(_entries(reader, tensor_count))
    start = -(-reader.at // alignment) * alignment
    if any(offset % alignment for *_, offset in entries):
        raise _DamagedError(f"a tensor does not start at a multiple of {alignment} bytes")
    tensors = tuple(_tensor(path, start, *entry) for entry in entries)
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise _DamagedError("it has two tensors of one name")
    return GGUFFile(path, metadata, tensors)


def _entries(reader: _Reader, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    for _ in range(count):
        name, dimensions = reader.text(), reader.number("I")
        shape = tuple(reversed(reader.numbers("Q", dimensions)))
        yield name, shape, reader.number("I"), reader.number("Q")


def _tensor(path: Path, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
    type_name, block, block_bytes = _type(path, name, kind)
    if not shape or prod(shape) < 1 or shape[-1] % block:
        raise _DamagedError(f"{name} of shape {list(shape)} is not made of blocks of {block}")
    return GGUFTensor(name, shape, type_name, start + offset, prod(shape) // block * block_bytes)


def _type(path: Path, tensor: str, kind: int) -> tuple[str, int, int]:
    """Name, weights per block and bytes per block of a type that can be dequantised."""
    try:
        import gguf
        import numpy as np
    except ImportError as error:
        raise UserError(
            "reading GGUF files needs the package gguf", "Install it: pip install 'sparsedeploy[gguf]'."
        ) from error
    try:
        known = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[known]
        gguf.dequantize(np.zeros(size, np.uint8), known)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UserError(
            f"{path} has a quantisation that the package gguf {_version()} cannot read: type {kind}, of {tensor}",
            "Upgrade gguf, or take the model in another quantisation, such as Q4_K_M or Q8_0.",
        ) from error
    return known.name, block, size


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")
