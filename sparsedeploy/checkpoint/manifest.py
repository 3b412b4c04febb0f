"""``sparsity.json``: what a checkpoint claims, read back with strict types."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from sparsedeploy.errors import UserError
from sparsedeploy.grid import Grid
from sparsedeploy.plan import SparsityPlan
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
        quantization: what the kept weights are rounded to; None where they are not.
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
    quantization: Grid | None = None
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
        for name, part in (
            ("engine", self.engine),
            ("recovery", self.recovery),
            ("quantization", self.quantization),
        ):
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
            quantization=_optional(fields, "quantization", Grid),
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
