"""Write pruned tensors into a folder in the making, in any order, each at its final place in the file.

The output shards have the layout of the source's: header and untouched tensors are copied once, byte for byte, and each
pruned tensor is written where the header says it lies. So nothing is written twice, and memory holds one tensor.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from sparsedeploy.checkpoint.masks import BIT_ORDER, FILE
from sparsedeploy.checkpoint.scales import FILE as SCALES
from sparsedeploy.folders import sync
from sparsedeploy.grid import Grid
from sparsedeploy.masks import pack_bits
from sparsedeploy.models.stored_names import StoredSlice
from sparsedeploy.models.tensor_files import StoredTensor, TensorFiles, read_header
from sparsedeploy.plan import ModuleTarget

_CHUNK = 1 << 20


class TensorWriter:
    """The weights and masks of a checkpoint in the making.

    Args:
        files: the source's tensors.
        folder: the folder to fill.
        targets: the modules that are pruned.
        slices: where the rows of each module are stored.
        grid: what the weights are rounded to: their scales are written, too.
    """

    def __init__(
        self,
        files: TensorFiles,
        folder: Path,
        targets: Iterable[ModuleTarget],
        slices: Mapping[str, tuple[StoredSlice, ...]],
        grid: Grid | None = None,
    ) -> None:
        self._files = files
        self._folder = folder
        self._targets = list(targets)
        self._slices = slices
        self._grid = grid
        self._entries: dict[str, dict[str, StoredTensor]] = {}
        self._written: set[Path] = set()

    def create(self) -> None:
        """Create the files: full length, with everything in them that pruning leaves alone, and safe on disk.

        Not needed again in a later process that resumes with the same folder.
        """
        pruned = {one.tensor.name for target in self._targets for one in self._slices[target.name]}
        for shard in self._files.shards:
            _copy_except(shard, self._folder / shard.name, pruned)
            sync(self._folder / shard.name)
        _create(self._folder / FILE, {t.name: ("U8", t.rows, -(-t.columns // 8)) for t in self._targets}, BIT_ORDER)
        sync(self._folder / FILE)
        if self._grid is not None:
            groups = self._grid.groups
            _create(self._folder / SCALES, {t.name: ("F16", t.rows, groups(t.columns)) for t in self._targets}, {})
            sync(self._folder / SCALES)
        sync(self._folder)

    def put(self, module: str, weight: torch.Tensor, mask: torch.Tensor, scales: torch.Tensor | None = None) -> None:
        """Write one module in the stored type: ``weight``, which is zero where ``mask`` (True = kept) is False.

        Args:
            scales: float16 ``[rows, groups]`` of a weight that is rounded.
        """
        for one in self._slices[module]:
            rows = weight[one.first : one.last].detach().to("cpu", one.tensor.dtype)
            values = (rows.T if one.transposed else rows).contiguous()
            self._write(self._folder / one.tensor.shard.name, one.start, values.view(torch.uint8).numpy().data)
        self._put(FILE, module, pack_bits(mask.cpu().contiguous()))
        if scales is not None:
            self._put(SCALES, module, scales.cpu().contiguous().view(torch.uint8))

    def sync(self) -> None:
        """Make everything written so far safe against a crash of the machine."""
        for path in self._written:
            sync(path)
        self._written.clear()

    def _put(self, file: str, module: str, values: torch.Tensor) -> None:
        if file not in self._entries:
            self._entries[file] = {entry.name: entry for entry in read_header(self._folder / file)}
        self._write(self._folder / file, self._entries[file][module].start, values.numpy().data)

    def _write(self, path: Path, start: int, data: memoryview) -> None:
        with open(path, "r+b") as file:
            file.seek(start)
            file.write(data)
        self._written.add(path)


def _copy_except(source: Path, target: Path, skipped: set[str]) -> None:
    """Copy a shard, leaving holes for the tensors named in ``skipped``."""
    tensors = read_header(source)
    with open(source, "rb") as reader, open(target, "wb") as writer:
        writer.truncate(source.stat().st_size)
        _copy_range(reader, writer, 0, tensors[0].start if tensors else source.stat().st_size)
        for tensor in tensors:
            if tensor.name not in skipped:
                _copy_range(reader, writer, tensor.start, tensor.end)


def _copy_range(reader: BinaryIO, writer: BinaryIO, start: int, end: int) -> None:
    reader.seek(start)
    writer.seek(start)
    while start < end:
        chunk = reader.read(min(_CHUNK, end - start))
        writer.write(chunk)
        start += len(chunk)


def _create(path: Path, tensors: Mapping[str, tuple[str, int, int]], metadata: Mapping[str, str]) -> None:
    """A safetensors file, all zero, of these types and shapes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (kind, rows, width) in tensors.items():
        size = rows * width * (2 if kind == "F16" else 1)
        header[name] = {"dtype": kind, "shape": [rows, width], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
