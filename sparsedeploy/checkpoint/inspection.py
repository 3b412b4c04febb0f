"""A checkpoint verified: every pruned tensor and mask is read and compared with what the manifest claims."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from sparsedeploy import progress
from sparsedeploy.checkpoint import masks as mask_file
from sparsedeploy.checkpoint.manifest import Manifest, ModuleRecord, load_manifest
from sparsedeploy.checkpoint.sizes import Matrix, measure
from sparsedeploy.linear_algebra import all_finite
from sparsedeploy.masks import broken_groups
from sparsedeploy.models.fingerprint import file_sha256
from sparsedeploy.models.stored_names import StoredSlice, read_linear
from sparsedeploy.models.tensor_files import TensorFiles
from sparsedeploy.models.weight_files import stray_weights, weight_files
from sparsedeploy.plan import NM, SparsityPlan, layer_number


@dataclass(frozen=True)
class ModuleFindings:
    """What a module's stored weight and mask show.

    Attributes:
        masked: weights that the mask prunes.
        zeros: weights that are zero in the file: the masked ones, and those that were zero or became so.
        row_sparsity: histogram of the rows' sparsity in ten bins of width 0.1.
        broken: groups that keep more weights than the pattern allows; None for unstructured modules, and all of them
            where the width is no multiple of the group.
        loss: the pruner's own reconstruction error, when it has one.
        matrix: what the sizes of formats depend on.
    """

    name: str
    rows: int
    columns: int
    masked: int
    zeros: int
    row_sparsity: list[int]
    pattern: NM | None
    broken: int | None
    loss: float | None
    matrix: Matrix

    @property
    def layer(self) -> int | None:
        """The decoder layer that its name says; None for the output head."""
        return layer_number(self.name)

    @property
    def follows(self) -> bool | None:
        """Whether the pattern holds in every group; None for unstructured modules."""
        return None if self.broken is None else self.broken == 0

    @property
    def sparsity(self) -> float:
        """The masked part."""
        return self.masked / (self.rows * self.columns)


@dataclass
class Inspection:
    """The result of :func:`inspect_checkpoint`.

    Attributes:
        problems: every way in which the folder differs from its manifest; empty when it is sound.
    """

    manifest: Manifest
    modules: list[ModuleFindings] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """The masked part of all modules' weights."""
        return sum(m.masked for m in self.modules) / sum(m.rows * m.columns for m in self.modules)

    @property
    def losses(self) -> dict[int | None, float]:
        """Layer (None: the output head) -> the sum of its modules' errors, the largest first; empty without any."""
        sums: dict[int | None, float] = {}
        for module in self.modules:
            if module.loss is not None:
                sums[module.layer] = sums.get(module.layer, 0.0) + module.loss
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    @property
    def zeros(self) -> float:
        """The part of all modules' weights that is zero in the file."""
        return sum(m.zeros for m in self.modules) / sum(m.rows * m.columns for m in self.modules)


def inspect_checkpoint(folder: Path) -> Inspection:
    """Read every pruned tensor and mask of a checkpoint and compare the folder with its manifest.

    Raises:
        UserError: see :func:`load_manifest`; also unreadable masks or weights.
    """
    manifest = load_manifest(folder)
    result = Inspection(manifest)
    check_files(folder, manifest, result.problems)
    plan = manifest.plan
    result.problems.extend(_plan_problems(plan, manifest))
    masks = mask_file.load_masks(folder / mask_file.FILE, {t.name: t.columns for t in plan.targets})
    files = TensorFiles(folder)
    for target in progress.track(plan.targets, "inspect modules"):
        tensor = manifest.modules[target.name].tensor
        if tensor not in files:
            result.problems.append(f"{target.name}: no tensor {tensor} in the weight files")
            continue
        weight = read_module(files, manifest.modules[target.name])
        mask = masks[target.name]
        if weight.shape != mask.shape:
            result.problems.append(f"{target.name}: weight {tuple(weight.shape)}, mask {tuple(mask.shape)}")
            continue
        finding = _examine(target.name, weight, mask, target.pattern, manifest.modules[target.name].loss)
        result.modules.append(finding)
        if not all_finite(weight):
            result.problems.append(f"{target.name}: NaN or infinite values")
        if finding.masked != target.zeros:
            result.problems.append(f"{target.name}: {finding.masked} masked weights, the plan has {target.zeros}")
        if int((weight[~mask] != 0).sum()):
            result.problems.append(f"{target.name}: weights that its mask prunes are not zero")
        if finding.follows is False:
            result.problems.append(f"{target.name}: {finding.broken} groups do not follow {target.pattern}")
    return result


def read_module(files: TensorFiles, module: ModuleRecord) -> torch.Tensor:
    """A module's stored weight ``[rows, columns]``."""
    if not module.slices:
        return files.read([files[module.tensor]])[module.tensor]
    slices = [
        StoredSlice(stored, one.first, one.last, stored.start + one.offset, one.transposed)
        for one in module.slices
        for stored in (files[one.tensor],)
    ]
    return read_linear(files, slices, module.columns)


def _examine(
    name: str, weight: torch.Tensor, mask: torch.Tensor, pattern: NM | None, loss: float | None
) -> ModuleFindings:
    rows, columns = mask.shape
    pruned_per_row = columns - mask.sum(dim=1)
    bins = (pruned_per_row * 10 // columns).clamp(max=9)
    return ModuleFindings(
        name=name,
        rows=rows,
        columns=columns,
        masked=int(pruned_per_row.sum()),
        zeros=int((weight == 0).sum()),
        row_sparsity=torch.bincount(bins, minlength=10).tolist(),
        pattern=pattern,
        broken=None if pattern is None else broken_groups(mask, pattern.n, pattern.m),
        loss=loss,
        matrix=measure(mask),
    )


def check_files(folder: Path, manifest: Manifest, problems: list[str]) -> None:
    """Add what is missing, stray or changed since the manifest was written."""
    needed = [mask_file.FILE, "config.json", *(path.name for path in weight_files(folder))]
    problems.extend(f"file {name} is not listed" for name in needed if name not in manifest.files)
    problems.extend(f"file {name} holds weights and does not belong to the model" for name in stray_weights(folder))
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"file {name} is missing")
        elif file_sha256(path) != expected:
            problems.append(f"file {name} was changed after it was written")


def _plan_problems(plan: SparsityPlan, manifest: Manifest) -> list[str]:
    """Where the plan and the manifest's modules contradict each other; reading the plan has checked it by itself."""
    problems = []
    for target in plan.targets:
        module = manifest.modules[target.name]  # reading the manifest found one for every target
        if (module.rows, module.columns, module.zeros) != (target.rows, target.columns, target.zeros):
            problems.append(f"{target.name}: the plan and the modules disagree")
    extra = manifest.modules.keys() - plan.by_name.keys()
    return problems + [f"{name}: in the modules, not in the plan" for name in sorted(extra)]
