"""``sparsity.json``: what a checkpoint claims, read back and verified against its files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch

from sparsedeploy import progress
from sparsedeploy.checkpoint import masks as mask_file
from sparsedeploy.errors import UserError
from sparsedeploy.linear_algebra import all_finite
from sparsedeploy.masks import follows_n_of_m
from sparsedeploy.models.fingerprint import file_sha256
from sparsedeploy.models.tensor_files import TensorFiles
from sparsedeploy.models.weight_files import stray_weights, weight_files
from sparsedeploy.plan import NM, SparsityPlan, parse_pattern
from sparsedeploy.reading import Fields, contained, read_object
from sparsedeploy.version import __version__

T = TypeVar("T")

FORMAT = 2
_READ = (1, 2)
_AGAIN = "Prune the model again."
MANIFEST = "sparsity.json"
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class SourceModel:
    """The dense model: as the user named it, and its hash where that is known."""

    name: str
    sha256: str | None


@dataclass(frozen=True)
class CalibrationRecord:
    """The calibration text: where it is, what was drawn from it, and the hash of the tokens."""

    data: str
    sequences: int
    length: int
    seed: int
    sha256: str
    field: str = "text"
    split: str = "train"


@dataclass(frozen=True)
class SliceRecord:
    """Rows of a module as they lie in a tensor of the files.

    Attributes:
        first, last: the module's rows, the last not included.
        offset: bytes from the tensor's start.
        transposed: whether the tensor holds them as columns.
    """

    tensor: str
    first: int
    last: int
    offset: int
    transposed: bool

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "tensor": self.tensor,
            "rows": [self.first, self.last],
            "offset": self.offset,
            "transposed": self.transposed,
        }


@dataclass(frozen=True)
class ModuleRecord:
    """One pruned module.

    Attributes:
        slices: how it lies in the files, where it is not simply one tensor ``[rows, columns]``.
        loss: the pruner's own reconstruction error, when it has one.
        tensor: the name of the weight in the files.
    """

    rows: int
    columns: int
    zeros: int
    loss: float | None
    tensor: str
    slices: tuple[SliceRecord, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        values = {
            "shape": [self.rows, self.columns],
            "zeros": self.zeros,
            "sparsity": self.zeros / (self.rows * self.columns),
            "loss": self.loss,
            "tensor": self.tensor,
        }
        return {**values, "slices": [one.to_json() for one in self.slices]} if self.slices else values


@dataclass(frozen=True)
class EngineRecord:
    """The program that pruned, where it was not this one."""

    name: str
    versions: dict[str, str]
    surplus_zeros: int = 0


@dataclass(frozen=True)
class RecoveryRecord:
    """What recovered quality after pruning.

    Attributes:
        options, training: by name; ``training`` is None for a method that does not train.
        data: the training text, see :meth:`TrainingData.describe`.
        report: what the method measured.
    """

    method: str
    options: dict[str, Any]
    training: dict[str, Any] | None
    data: dict[str, Any] | None
    seed: int
    report: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint claims.

    Attributes:
        request: everything that was asked for, in the sections of a recipe (``prune``, ``calibration``, ``recover``,
            ``train``).
        method: the pruner; ``options`` its options.
        calibration: None when no text was read.
        modules: by full name.
        dtype: the type that the model was computed in; None where it is not known. Masks may differ between types.
        files: SHA-256 by name.
        sparsedeploy: the version that wrote it.
    """

    source: SourceModel
    request: dict[str, dict[str, Any]]
    method: str
    options: dict[str, Any]
    calibration: CalibrationRecord | None
    plan: SparsityPlan
    modules: dict[str, ModuleRecord]
    versions: dict[str, str]
    engine: EngineRecord | None = None
    recovery: RecoveryRecord | None = None
    dtype: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    sparsedeploy: str = __version__

    @property
    def achieved(self) -> float:
        """The parameter-weighted sparsity."""
        return self.plan.achieved

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain data; parts that are None are left out, but for ``calibration``."""
        values: dict[str, Any] = {
            "format": FORMAT,
            "sparsedeploy": self.sparsedeploy,
            "source": asdict(self.source),
            "request": self.request,
            "method": self.method,
            "options": self.options,
            "dtype": self.dtype,
            "calibration": asdict(self.calibration) if self.calibration else None,
            "plan": self.plan.to_dict(),
            "achieved": self.achieved,
            "modules": {name: module.to_json() for name, module in self.modules.items()},
            "versions": self.versions,
        }
        for name, part in (("engine", self.engine), ("recovery", self.recovery)):
            if part is not None:
                values[name] = asdict(part)
        return {**values, "files": self.files}

    @staticmethod
    def from_json(values: dict[str, Any], where: str) -> Manifest:
        """Read what :meth:`to_json` wrote, or format 1, which kept less: what it lacks is at its defaults.

        Args:
            where: names the file in errors.

        Raises:
            UserError: another format, or an entry that is missing or of another type, naming its key.
        """
        fields = Fields(values, where, _AGAIN)
        if (found := fields.integer("format")) not in _READ:
            raise UserError(f"{where} has format {found}, not {FORMAT}", "Use the version that wrote it.")
        plan = SparsityPlan.from_dict(fields.mapping("plan"))
        manifest = Manifest(
            source=fields.fields("source").build(SourceModel),
            request={},
            method=fields.text("method"),
            options=fields.mapping("options"),
            calibration=_optional(fields, "calibration", CalibrationRecord),
            plan=plan,
            modules={name: _module(fields.fields("modules"), name) for name in fields.mapping("modules")},
            versions=_texts(fields, "versions"),
            engine=_optional(fields, "engine", EngineRecord),
            recovery=_recovery(fields),
            dtype=fields.text("dtype", None),
            files=_texts(fields, "files"),
            sparsedeploy=fields.text("sparsedeploy"),
        )
        if lacking := [target.name for target in plan.targets if target.name not in manifest.modules]:
            raise UserError(f"{where}: 'modules' lacks {lacking[0]}", _AGAIN)
        if found == 1:
            return replace(manifest, plan=_without_search(plan), request=_request_of_format_1(manifest))
        sections = fields.fields("request")
        return replace(manifest, request={name: sections.mapping(name) for name in sections.values})


def _optional(fields: Fields, key: str, kind: type[T]) -> T | None:
    if fields.mapping(key, None) is None:
        return None
    return fields.fields(key).build(kind)


def _texts(fields: Fields, key: str) -> dict[str, str]:
    inner = fields.fields(key)
    return {name: inner.text(name) for name in inner.values}


def _module(modules: Fields, name: str) -> ModuleRecord:
    fields = modules.fields(name)
    rows, columns = _pair(fields, "shape")
    slices: tuple[SliceRecord, ...] = ()
    if "slices" in fields:
        slices = tuple(
            SliceRecord(one.text("tensor"), *_pair(one, "rows"), one.integer("offset"), one.flag("transposed"))
            for one in fields.each("slices")
        )
    loss = fields.number("loss", None)
    return ModuleRecord(rows, columns, fields.integer("zeros"), loss, fields.text("tensor"), slices)


def _pair(fields: Fields, key: str) -> tuple[int, int]:
    values = fields.items(key)
    if len(values) != 2 or not all(type(value) is int and value >= 0 for value in values):
        raise UserError(f"{fields.where}: '{key}' is not two whole numbers", _AGAIN)
    return values[0], values[1]


def _recovery(fields: Fields) -> RecoveryRecord | None:
    if fields.mapping("recovery", None) is None:
        return None
    part = fields.fields("recovery")
    return RecoveryRecord(
        part.text("method"),
        part.mapping("options"),
        part.mapping("training", None),
        part.mapping("data", None),
        part.integer("seed", minimum=-(2**63)),
        part.mapping("report"),
    )


def _without_search(plan: SparsityPlan) -> SparsityPlan:
    """Format 1 kept ``search`` beside what the search had found, which its own options refuse."""
    found = "beta" in plan.options and plan.options["beta"] is not None
    return replace(plan, options={"beta": plan.options["beta"]}) if found and plan.options.get("search") else plan


def _request_of_format_1(manifest: Manifest) -> dict[str, dict[str, Any]]:
    plan, calibration = manifest.plan, manifest.calibration
    prune = {
        "sparsity": plan.sparsity,
        "pattern": plan.pattern,
        "pattern_options": plan.details.get("mixed"),
        "method": manifest.method,
        "method_options": manifest.options,
        "allocation": None if plan.allocation == "uniform" else plan.allocation,
        "allocation_options": dict(_without_search(plan).options),
    }
    request: dict[str, dict[str, Any]] = {"prune": prune}
    if calibration is not None:
        request["calibration"] = {key: getattr(calibration, key) for key in ("data", "sequences", "length", "seed")}
    if (recovery := manifest.recovery) is not None:
        request["recover"] = {key: getattr(recovery, key) for key in ("method", "options", "training", "seed")}
    return request


@dataclass(frozen=True)
class ModuleFindings:
    """What a module's stored weight and mask show.

    Attributes:
        masked: weights that the mask prunes.
        zeros: weights that are zero in the file: the masked ones, and those that were zero or became so.
        row_sparsity: histogram of the rows' sparsity in ten bins of width 0.1.
        follows: whether the pattern holds in every group; None for unstructured modules.
    """

    name: str
    rows: int
    columns: int
    masked: int
    zeros: int
    row_sparsity: list[int]
    pattern: NM | None
    follows: bool | None

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
    def zeros(self) -> float:
        """The part of all modules' weights that is zero in the file."""
        return sum(m.zeros for m in self.modules) / sum(m.rows * m.columns for m in self.modules)


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a pruned checkpoint.

    Raises:
        UserError: no such folder, no manifest, or one of another format.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise UserError(f"{folder} has no {MANIFEST}", "Give a folder that sparsedeploy prune wrote.")
    manifest = Manifest.from_json(read_object(path, fix=_AGAIN), str(path))
    for name in manifest.files:
        contained(Path(folder), name, str(path))
    return manifest


def inspect_checkpoint(folder: Path) -> Inspection:
    """Read every pruned tensor and mask of a checkpoint and compare the folder with its manifest.

    Raises:
        UserError: see :func:`load_manifest`; also unreadable masks or weights.
    """
    manifest = load_manifest(folder)
    result = Inspection(manifest)
    _check_files(folder, manifest, result.problems)
    plan = manifest.plan
    result.problems.extend(_plan_problems(plan, manifest))
    masks = mask_file.load_masks(folder / mask_file.FILE, {t.name: t.columns for t in plan.targets})
    located = {name: tensor.shard for name, tensor in TensorFiles(folder).items()}
    for target in progress.track(plan.targets, "inspect modules"):
        tensor = manifest.modules[target.name].tensor
        if tensor not in located:
            result.problems.append(f"{target.name}: no tensor {tensor} in the weight files")
            continue
        weight = _read_module(located, manifest.modules[target.name])
        mask = masks[target.name]
        if weight.shape != mask.shape:
            result.problems.append(f"{target.name}: weight {tuple(weight.shape)}, mask {tuple(mask.shape)}")
            continue
        finding = _examine(target.name, weight, mask, target.pattern)
        result.modules.append(finding)
        if not all_finite(weight):
            result.problems.append(f"{target.name}: NaN or infinite values")
        if finding.masked != target.zeros:
            result.problems.append(f"{target.name}: {finding.masked} masked weights, the plan has {target.zeros}")
        if int((weight[~mask] != 0).sum()):
            result.problems.append(f"{target.name}: weights that its mask prunes are not zero")
        if finding.follows is False:
            result.problems.append(f"{target.name}: not every group follows {target.pattern}")
    return result


def _read_module(located: dict[str, Path], module: ModuleRecord) -> torch.Tensor:
    """A module's stored weight ``[rows, columns]``."""
    if not module.slices:
        return _read(located, module.tensor)
    parts = []
    for one in module.slices:
        weight = _read(located, one.tensor)
        start = one.offset // weight.element_size()
        weight = weight.flatten()[start : start + (one.last - one.first) * module.columns]
        parts.append(weight.view(module.columns, -1).T if one.transposed else weight.view(-1, module.columns))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _read(located: dict[str, Path], tensor: str) -> torch.Tensor:
    with safetensors.safe_open(located[tensor], framework="pt") as file:
        weight: torch.Tensor = file.get_tensor(tensor)
    return weight


def _examine(name: str, weight: torch.Tensor, mask: torch.Tensor, pattern: NM | None) -> ModuleFindings:
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
        follows=None if pattern is None else follows_n_of_m(mask, pattern.n, pattern.m),
    )


def _check_files(folder: Path, manifest: Manifest, problems: list[str]) -> None:
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
    """Where the plan, its target and the manifest's modules contradict each other."""
    problems = []
    if not plan.targets:
        return ["the plan has no modules"]
    pattern = parse_pattern(plan.pattern)
    # A plan meets its target within one unit: a row's weight over all rows of a module, or a layer's N of every M.
    unit = max(target.rows for target in plan.targets) / sum(target.size for target in plan.targets)
    if abs(plan.achieved - plan.sparsity) > unit + 0.005:
        problems.append(f"the plan asks for {plan.sparsity:g} and its modules give {plan.achieved:.4f}")
    wanted = {None} if pattern is None else {pattern} if isinstance(pattern, NM) else None
    for target in plan.targets:
        module = manifest.modules[target.name]  # reading the manifest found one for every target
        if wanted is not None and target.pattern not in wanted:
            problems.append(f"{target.name}: pattern {target.pattern}, the plan's is {plan.pattern}")
        if (module.rows, module.columns, module.zeros) != (target.rows, target.columns, target.zeros):
            problems.append(f"{target.name}: the plan and the modules disagree")
    extra = manifest.modules.keys() - plan.by_name.keys()
    return problems + [f"{name}: in the modules, not in the plan" for name in sorted(extra)]
