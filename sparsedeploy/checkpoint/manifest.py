"""``sparsity.json``: what a checkpoint claims, read back and verified against its files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch

from sparsedeploy import progress
from sparsedeploy.checkpoint import masks as mask_file
from sparsedeploy.errors import UserError
from sparsedeploy.masks import follows_n_of_m
from sparsedeploy.models.fingerprint import file_sha256
from sparsedeploy.models.weight_files import weight_files
from sparsedeploy.plan import NM, SparsityPlan
from sparsedeploy.reading import read_object

FORMAT = 1
MANIFEST = "sparsity.json"
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class ModuleFindings:
    """What a module's stored weight and mask show.

    Attributes:
        zeros: masked weights; ``value_zeros`` counts every weight that is zero.
        row_sparsity: histogram of the rows' sparsity in ten bins of width 0.1.
        follows: whether the pattern holds in every group; None for unstructured modules.
    """

    name: str
    rows: int
    columns: int
    zeros: int
    value_zeros: int
    row_sparsity: list[int]
    pattern: NM | None
    follows: bool | None

    @property
    def sparsity(self) -> float:
        return self.zeros / (self.rows * self.columns)


@dataclass
class Inspection:
    """The result of :func:`inspect_checkpoint`.

    Attributes:
        problems: every way in which the folder differs from its manifest; empty when it is sound.
    """

    manifest: dict[str, Any]
    modules: list[ModuleFindings] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        return sum(m.zeros for m in self.modules) / sum(m.rows * m.columns for m in self.modules)


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a pruned checkpoint.

    Raises:
        UserError: no such folder, no manifest, or one of another format.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise UserError(f"{folder} has no {MANIFEST}", "Give a folder that sparsedeploy prune wrote.")
    manifest = read_object(path, fix="Prune the model again.")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} has format {manifest.get('format')}, not {FORMAT}", "Use the version that wrote it.")
    return dict(manifest)


def inspect_checkpoint(folder: Path) -> Inspection:
    """Read every pruned tensor and mask of a checkpoint and compare the folder with its manifest.

    Raises:
        UserError: see :func:`load_manifest`; also unreadable masks or weights.
    """
    manifest = load_manifest(folder)
    result = Inspection(manifest)
    _check_files(folder, manifest, result.problems)
    plan = SparsityPlan.from_dict(manifest["plan"])
    masks = mask_file.load_masks(folder / mask_file.FILE, {t.name: t.columns for t in plan.targets})
    located = _locate(folder)
    for target in progress.track(plan.targets, "inspect modules"):
        tensor = manifest["modules"][target.name]["tensor"]
        if tensor not in located:
            result.problems.append(f"{target.name}: no tensor {tensor} in the weight files")
            continue
        weight = _read_module(located, manifest["modules"][target.name])
        mask = masks[target.name]
        if weight.shape != mask.shape:
            result.problems.append(f"{target.name}: weight {tuple(weight.shape)}, mask {tuple(mask.shape)}")
            continue
        finding = _examine(target.name, weight, mask, target.pattern)
        result.modules.append(finding)
        if finding.zeros != target.zeros:
            result.problems.append(f"{target.name}: {finding.zeros} masked weights, the plan has {target.zeros}")
        if int((weight[~mask] != 0).sum()):
            result.problems.append(f"{target.name}: weights that its mask prunes are not zero")
        if finding.follows is False:
            result.problems.append(f"{target.name}: not every group follows {target.pattern}")
    return result


def _read_module(located: dict[str, Path], module: dict[str, Any]) -> torch.Tensor:
    """A module's stored weight ``[rows, columns]``."""
    columns = module["shape"][1]
    parts = []
    for part in module.get("slices") or [{"tensor": module["tensor"]}]:
        with safetensors.safe_open(located[part["tensor"]], framework="pt") as file:
            weight = file.get_tensor(part["tensor"])
        if "rows" in part:
            first, last = part["rows"]
            start = part["offset"] // weight.element_size()
            weight = weight.flatten()[start : start + (last - first) * columns]
            weight = weight.view(columns, -1).T if part["transposed"] else weight.view(-1, columns)
        parts.append(weight)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _examine(name: str, weight: torch.Tensor, mask: torch.Tensor, pattern: NM | None) -> ModuleFindings:
    rows, columns = mask.shape
    pruned_per_row = columns - mask.sum(dim=1)
    bins = (pruned_per_row * 10 // columns).clamp(max=9)
    return ModuleFindings(
        name=name,
        rows=rows,
        columns=columns,
        zeros=int(pruned_per_row.sum()),
        value_zeros=int((weight == 0).sum()),
        row_sparsity=torch.bincount(bins, minlength=10).tolist(),
        pattern=pattern,
        follows=None if pattern is None else follows_n_of_m(mask, pattern.n, pattern.m),
    )


def _check_files(folder: Path, manifest: dict[str, Any], problems: list[str]) -> None:
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"file {name} is missing")
        elif file_sha256(path) != expected:
            problems.append(f"file {name} was changed after it was written")


def _locate(folder: Path) -> dict[str, Path]:
    located: dict[str, Path] = {}
    for shard in weight_files(folder):
        try:
            with safetensors.safe_open(shard, framework="pt") as file:
                located.update(dict.fromkeys(file.keys(), shard))
        except safetensors.SafetensorError as error:
            raise UserError(f"{shard} is truncated or corrupt ({error})", "Write the checkpoint again.") from error
    return located
