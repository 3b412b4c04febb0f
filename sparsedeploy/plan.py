"""The sparsity plan: how many weights each module loses. Allocators make it, pruners obey it, files carry it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json
from sparsedeploy.reading import Fields, read_object

FORMAT = 1
_AGAIN = "Make the plan again: sparsedeploy allocate."


@dataclass(frozen=True)
class NM:
    """N of every M consecutive weights along the input dimension are **kept**."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if self.m < 1 or self.n < 1:
            raise UserError(f"pattern {self} keeps nothing", "Use N:M with 1 <= N <= M, such as 2:4.")
        if self.n > self.m:
            raise UserError(f"pattern {self} keeps more than it has", "N is the number kept of every M: use N <= M.")

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @staticmethod
    def parse(text: str) -> NM:
        """Read ``2:4``.

        Raises:
            UserError: another form, or N > M.
        """
        match = re.fullmatch(r"(\d+):(\d+)", text.strip())
        if match is None:
            raise UserError(
                f"pattern '{text}' is not known",
                "Use unstructured, N:M (N of every M kept, e.g. 2:4) or mixed-N:M (on average, e.g. mixed-2:8).",
            )
        return NM(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class MixedNM:
    """Each unit (usually a layer) keeps its own N of every M; ``keep`` is the parameter-weighted average of N."""

    keep: float
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.m:
            raise UserError(
                f"pattern {self} keeps {self.keep:g} of {self.m} on average",
                f"The average must be from 1 to {self.m}, such as mixed-2:8.",
            )

    @property
    def sparsity(self) -> float:
        return 1 - self.keep / self.m

    def __str__(self) -> str:
        return f"mixed-{self.keep:.10g}:{self.m}"


def parse_pattern(text: str) -> NM | MixedNM | None:
    """Read ``unstructured`` (None), ``2:4`` or ``mixed-2:8`` (the average may be a fraction: ``mixed-2.5:8``).

    Raises:
        UserError: another form, or one that keeps nothing or more than it has.
    """
    if text == "unstructured":
        return None
    if match := re.fullmatch(r"mixed-(\d+(?:\.\d+)?):(\d+)", text.strip()):
        return MixedNM(float(match[1]), int(match[2]))
    return NM.parse(text)


def layer_number(name: str) -> int | None:
    """The decoder layer that a module's name says; None for the output head."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def depths(names: Iterable[str]) -> dict[str, int]:
    """The decoder layer of each module by its name; the output head comes behind the last one."""
    numbers = {name: layer_number(name) for name in names}
    behind = 1 + max((at for at in numbers.values() if at is not None), default=-1)
    return {name: behind if at is None else at for name, at in numbers.items()}


@dataclass(frozen=True)
class ModuleShape:
    """A prunable linear: its full name and weight shape ``[rows, columns]`` = [outputs, inputs]."""

    name: str
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class ModuleTarget:
    """What one module loses: ``zeros_per_row`` on average over its rows, or an N:M pattern.

    Every pruner makes exactly ``rows * zeros_per_row`` zeros; whether each row gets the same number is the pruner's.
    """

    name: str
    rows: int
    columns: int
    zeros_per_row: int
    pattern: NM | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.zeros_per_row <= self.columns:
            raise UserError(
                f"the plan asks {self.name} for {self.zeros_per_row} zeros in rows of {self.columns}", _AGAIN
            )
        if self.pattern is not None:
            if self.columns % self.pattern.m:
                raise UserError(
                    f"{self.name} has {self.columns} inputs, not divisible by the {self.pattern.m} of {self.pattern}",
                    "Choose an M that divides it, or unstructured.",
                )
            if self.zeros_per_row != self.columns // self.pattern.m * (self.pattern.m - self.pattern.n):
                raise UserError(
                    f"the plan asks {self.name} for {self.zeros_per_row} zeros per row, not what {self.pattern} has",
                    _AGAIN,
                )

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def zeros(self) -> int:
        return self.rows * self.zeros_per_row

    @property
    def sparsity(self) -> float:
        return self.zeros_per_row / self.columns


@dataclass(frozen=True)
class SparsityPlan:
    """Module name -> target, in model order, with what led to it.

    Attributes:
        sparsity: the asked parameter-weighted fraction of zeros over prunable weights.
        pattern: ``unstructured``, ``N:M`` or ``mixed-N:M``.
        allocation: the allocator's name; ``options`` its options.
        model_sha256: the model that the plan is for (``models.fingerprint.model_sha256``), or None when unknown.
        details: what the allocator measured, for plots and reports.
    """

    sparsity: float
    pattern: str
    allocation: str
    targets: tuple[ModuleTarget, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    model_sha256: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def by_name(self) -> dict[str, ModuleTarget]:
        return {target.name: target for target in self.targets}

    @property
    def achieved(self) -> float:
        """The parameter-weighted sparsity that the integer counts give."""
        return sum(t.zeros for t in self.targets) / sum(t.size for t in self.targets)

    @property
    def has_head(self) -> bool:
        """Whether the output head is among the modules."""
        return any(layer_number(target.name) is None for target in self.targets)

    def contradictions(self) -> list[str]:
        """Where the modules give another sparsity or pattern than the plan asks for, a line for each."""
        problems = []
        # A plan meets its target within one unit: an entry in each row of a module, or with a mixed pattern one
        # entry in each group of M of a whole layer.
        pattern = parse_pattern(self.pattern)
        steps: dict[str | int, float] = defaultdict(float)
        for target, layer in zip(self.targets, depths(self.by_name).values(), strict=True):
            if isinstance(pattern, MixedNM):
                steps[layer] += target.size / pattern.m
            else:
                steps[target.name] = target.rows
        unit = max(steps.values()) / sum(target.size for target in self.targets)
        if abs(self.achieved - self.sparsity) > unit + 0.005:
            problems.append(f"the plan asks for {self.sparsity:g} and its modules give {self.achieved:.4f}")
        wanted = {None} if pattern is None else {pattern} if isinstance(pattern, NM) else None
        for target in self.targets:
            if wanted is not None and target.pattern not in wanted:
                problems.append(f"{target.name}: pattern {target.pattern}, the plan's is {self.pattern}")
        return problems

    def check_modules(self, shapes: list[ModuleShape]) -> None:
        """Refuse a plan that is for another model.

        Raises:
            UserError: it names modules that the model lacks, lacks modules that it has, or disagrees on a shape.
        """
        have = {shape.name: shape for shape in shapes}
        plan = self.by_name
        fix = "Make the plan again for this model: sparsedeploy allocate."
        if extra := [name for name in plan if name not in have]:
            raise UserError(f"the plan names {len(extra)} modules that the model lacks, such as {extra[0]}", fix)
        if lacking := [name for name in have if name not in plan]:
            raise UserError(f"the plan lacks {len(lacking)} modules that the model has, such as {lacking[0]}", fix)
        for name, target in plan.items():
            if (target.rows, target.columns) != (have[name].rows, have[name].columns):
                raise UserError(f"the plan has {name} as {target.rows} x {target.columns}, the model differs", fix)

    def to_dict(self) -> dict[str, Any]:
        modules = []
        for target in self.targets:
            entry = asdict(target)
            entry["pattern"] = str(target.pattern) if target.pattern else None
            entry["sparsity"] = target.sparsity
            modules.append(entry)
        return {
            "format": FORMAT,
            "sparsity": self.sparsity,
            "achieved": self.achieved,
            "pattern": self.pattern,
            "allocation": self.allocation,
            "options": dict(self.options),
            "model_sha256": self.model_sha256,
            "modules": modules,
            "details": dict(self.details),
        }

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> SparsityPlan:
        """Read what :meth:`to_dict` wrote.

        Raises:
            UserError: another format, or a missing or malformed entry.
        """
        fields = Fields(value, "the plan", "Make it again: sparsedeploy allocate.")
        if (found := fields.integer("format")) != FORMAT:
            raise UserError(f"plan format {found} is not {FORMAT}", "Use the version that wrote it.")
        targets = tuple(
            ModuleTarget(
                name=entry.text("name"),
                rows=entry.integer("rows", minimum=1),
                columns=entry.integer("columns", minimum=1),
                zeros_per_row=entry.integer("zeros_per_row"),
                pattern=NM.parse(pattern) if (pattern := entry.text("pattern", None)) else None,
            )
            for entry in fields.each("modules")
        )
        plan = SparsityPlan(
            sparsity=float(fields.number("sparsity")),
            pattern=fields.text("pattern"),
            allocation=fields.text("allocation"),
            targets=targets,
            options=fields.mapping("options"),
            model_sha256=fields.text("model_sha256", None),
            details=fields.mapping("details"),
        )
        parse_pattern(plan.pattern)
        if not 0 <= plan.sparsity <= 1:
            raise UserError(f"the plan's sparsity is {plan.sparsity:g}", fields.fix)
        if not targets:
            raise UserError("the plan names no modules", fields.fix)
        if len(plan.by_name) < len(targets):
            names = [target.name for target in targets]
            twice = next(name for at, name in enumerate(names) if name in names[:at])
            raise UserError(f"the plan has {twice} twice", fields.fix)
        if problems := plan.contradictions():
            raise UserError(problems[0], fields.fix)
        return plan

    def save(self, path: Path) -> None:
        write_json(path, self.to_dict())

    @staticmethod
    def load(path: Path) -> SparsityPlan:
        """Read a plan file.

        Raises:
            UserError: no such file, or not a plan.
        """
        fix = "Make a plan: sparsedeploy allocate MODEL -o plan.json."
        if not Path(path).exists():
            raise UserError(f"no plan at {path}", fix)
        return SparsityPlan.from_dict(read_object(Path(path), fix=fix))


def check_sparsity(sparsity: float) -> None:
    """Refuse a target outside [0, 1).

    Raises:
        UserError: also for NaN.
    """
    if not 0 <= sparsity < 1:
        raise UserError(f"sparsity {sparsity} is outside [0, 1)", "It is the fraction of zeros: 0.7 removes 70 %.")
