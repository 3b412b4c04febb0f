"""What differs between two model folders: configuration, tensors, zeros and masks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsedeploy import progress
from sparsedeploy.checkpoint import masks as mask_file
from sparsedeploy.checkpoint.manifest import MANIFEST, load_manifest
from sparsedeploy.errors import UserError
from sparsedeploy.models.tensor_files import StoredTensor, TensorFiles
from sparsedeploy.plan import layer_number
from sparsedeploy.reading import SOUND_COPY, read_object


@dataclass(frozen=True)
class TensorChange:
    """A tensor of both folders, of one shape, that differs.

    Attributes:
        changed: elements that differ.
        largest: the largest difference of an element.
        lost: the norm of the difference as a part of the norm in B; None where B's is zero.
        zeros: elements that are zero, in A and in B.
    """

    name: str
    size: int
    changed: int
    largest: float
    lost: float | None
    zeros: tuple[int, int]
    types: tuple[str, str]


@dataclass(frozen=True)
class LayerDifference:
    """The matrices of one decoder layer.

    Attributes:
        sparsity: zeros of the matrices, in A and in B.
        lost: the norm of what changed as a part of the norm in B; None where B's is zero.
    """

    layer: int
    sparsity: tuple[float, float]
    lost: float | None


@dataclass(frozen=True)
class MaskOverlap:
    """The masks of one module in both folders.

    Attributes:
        pruned: weights that A prunes, and B.
        both: those that both prune.
    """

    name: str
    pruned: tuple[int, int]
    both: int

    @property
    def jaccard(self) -> float:
        """Those that both prune among those that either does; 1 where none is pruned."""
        either = sum(self.pruned) - self.both
        return self.both / either if either else 1.0


@dataclass
class FolderDifference:
    """A against B.

    Attributes:
        config: key, with dots for what is inside -> its value in A and in B; None where it is not there.
        only: stored tensors that only A has, and only B.
        shapes: tensor -> its shape in A and in B, where they differ.
        same: tensors that are equal, bit for bit.
        overlap: None where a folder has no masks.
    """

    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    only: tuple[list[str], list[str]] = ([], [])
    shapes: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    same: int = 0
    changed: list[TensorChange] = field(default_factory=list)
    layers: list[LayerDifference] = field(default_factory=list)
    overlap: list[MaskOverlap] | None = None

    @property
    def largest(self) -> TensorChange | None:
        """The tensor with the largest change of an element."""
        return max(self.changed, key=lambda one: one.largest, default=None)

    @property
    def equal(self) -> bool:
        """Whether configuration and weights are the same."""
        return not (self.config or self.only[0] or self.only[1] or self.shapes or self.changed)


def compare_folders(a: Path, b: Path) -> FolderDifference:
    """Compare two model folders tensor by tensor; memory holds two tensors.

    Raises:
        UserError: a folder that is no model, or whose weights or masks cannot be read.
    """
    result = FolderDifference(config=_config_changes(_config(a), _config(b)))
    files = TensorFiles(a), TensorFiles(b)
    names = [set(each.names) for each in files]
    result.only = sorted(names[0] - names[1]), sorted(names[1] - names[0])
    # Layer -> zeros in A, zeros in B, elements, squared norm of the difference, squared norm of B.
    sums: dict[int, list[float]] = {}
    shared = sorted(names[0] & names[1], key=_natural)
    for name in progress.track(shared, "compare tensors", unit="tensors"):
        stored = files[0][name], files[1][name]
        if stored[0].shape != stored[1].shape:
            result.shapes[name] = list(stored[0].shape), list(stored[1].shape)
            continue
        one, two = (_read(each, tensor) for each, tensor in zip(files, stored, strict=True))
        change, squares = _change(name, one, two, (stored[0].kind, stored[1].kind))
        if change.changed or stored[0].kind != stored[1].kind:
            result.changed.append(change)
        else:
            result.same += 1
        layer = layer_number(name)
        if layer is not None and len(stored[0].shape) > 1:
            total = sums.setdefault(layer, [0.0] * 5)
            for at, value in enumerate((*change.zeros, change.size, *squares)):
                total[at] += value
    result.layers = [
        LayerDifference(layer, (zeros_a / size, zeros_b / size), math.sqrt(moved / norm) if norm else None)
        for layer, (zeros_a, zeros_b, size, moved, norm) in sorted(sums.items())
    ]
    if (a / MANIFEST).is_file() and (b / MANIFEST).is_file():
        result.overlap = list(_overlaps(a, b))
    return result


def _change(
    name: str, one: torch.Tensor, two: torch.Tensor, kinds: tuple[str, str]
) -> tuple[TensorChange, tuple[float, float]]:
    """The change, and the squared norms of the difference and of B's tensor."""
    zeros = tuple(each.numel() - int(torch.count_nonzero(each)) for each in (one, two))
    if one.dtype == two.dtype and torch.equal(one, two):
        norm = float(two.double().square().sum())
        return TensorChange(name, one.numel(), 0, 0.0, 0.0, (zeros[0], zeros[1]), kinds), (0.0, norm)
    moved = one.double() - two.double()
    squares = float(moved.square().sum()), float(two.double().square().sum())
    change = TensorChange(
        name,
        one.numel(),
        int(torch.count_nonzero(moved)),
        float(moved.abs().max()) if moved.numel() else 0.0,
        math.sqrt(squares[0] / squares[1]) if squares[1] else None,
        (zeros[0], zeros[1]),
        kinds,
    )
    return change, squares


def _read(files: TensorFiles, tensor: StoredTensor) -> torch.Tensor:
    return files.read([tensor])[tensor.name]


def _overlaps(a: Path, b: Path) -> Iterator[MaskOverlap]:
    """Module by module, those of both whose shapes agree."""
    manifests = load_manifest(a), load_manifest(b)
    shared = {
        name: one.columns
        for name, one in manifests[0].modules.items()
        if (two := manifests[1].modules.get(name)) is not None and (one.rows, one.columns) == (two.rows, two.columns)
    }
    for name, columns in shared.items():
        left, right = (
            mask_file.load_masks(folder / mask_file.FILE, {name: columns})[name].logical_not() for folder in (a, b)
        )
        yield MaskOverlap(name, (int(left.sum()), int(right.sum())), int((left & right).sum()))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json", "Give a Hugging Face model folder.")
    return dict(_flat(read_object(path, fix=SOUND_COPY)))


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", _comparable(value)


def _comparable(value: Any) -> Any:
    """The value with text in place of numbers that are not finite, which JSON has no form for; NaN equals itself."""
    if isinstance(value, Mapping):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_comparable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _config_changes(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        key: (a.get(key), b.get(key)) for key in sorted({*a, *b}) if (key in a, a.get(key)) != (key in b, b.get(key))
    }


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
