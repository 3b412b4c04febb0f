"""What the jobs decide, in one place: the frozen dataclasses that command line, recipes and manifests are read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.conversion import plain_options
from sparsedeploy.grid import KINDS, Grid
from sparsedeploy.models.options import LoadOptions
from sparsedeploy.options import Options, described, like, option, seed_option
from sparsedeploy.plan import SparsityPlan
from sparsedeploy.quality.options import EvalOptions, TaskOptions, TextOptions
from sparsedeploy.recovery.options import DataOptions, Loss
from sparsedeploy.registry import ALLOCATORS, PRUNERS, RECOVERIES
from sparsedeploy.resources import shipped
from sparsedeploy.speed.options import BenchmarkOptions, SpeedOptions
from sparsedeploy.workflows.aims import AIMS, CPU

_TARGET = ("sparsity", "pattern", "pattern_options")
_SPREAD = ("allocation", "allocation_options")


def recipe_names() -> list[str]:
    """The shipped recipes."""
    return sorted(path.stem for path in shipped("recipes").glob("*.yaml"))


@dataclass(frozen=True)
class RunOptions(LoadOptions):
    """What only matters at the run: how models are loaded, and what happens to a folder that exists already."""

    resume: bool = option(False, "Continue an interrupted run of this command; the result is identical.")
    overwrite: bool = option(False, "Replace the output if it exists.")


@dataclass(frozen=True)
class RecoverRunOptions(RunOptions):
    """The run of a recovery: also where the dense model is now; its hash must be the manifest's."""

    dense: str | None = option(None, "Where the dense model is now, for what starts or learns from it.", reads=True)


@dataclass(frozen=True)
class PruneRunOptions(RunOptions):
    """The run of a pruning: also what prunes, and what is read in place of an allocation and of flags."""

    engine: Literal["sparsedeploy", "llmcompressor"] = option(
        "sparsedeploy",
        "What prunes: sparsedeploy, or llmcompressor (in its own environment; wanda or sparsegpt).",
    )
    plan: Path | None = option(None, "Use this plan file; no allocation is run.")
    recipe: str | None = option(
        None, "A shipped recipe's name or a YAML file; flags override it.", choices=recipe_names, reads=True
    )


@dataclass(frozen=True)
class PruneOptions(Options):
    """Everything that ``prune`` decides.

    Attributes:
        sparsity: None takes the N:M pattern's own.
        allocation: None leaves it to the job: uniform, or what the recovery method uses.
        pattern_options: of a mixed pattern (:class:`sparsedeploy.allocation.MixedOptions`).
        plan: a ready plan, in place of ``sparsity``, ``pattern`` and ``allocation``.
    """

    sparsity: float | None = option(
        None, "Fraction of decoder-linear weights to remove, such as 0.7.", short="-s", replaces=_TARGET
    )
    method: str = option(
        "sparsegpt",
        "How weights are chosen: {choices}.",
        short="-m",
        choices=PRUNERS.names,
        replaces=("method", "method_options"),
    )
    allocation: str | None = option(
        None,
        "How sparsity is spread over layers: {choices}.",
        unset="uniform; with losa: rmi",
        short="-a",
        choices=ALLOCATORS.names,
        replaces=_SPREAD,
    )
    pattern: str = option(
        "unstructured",
        "unstructured; N:M with N of every M kept (2:4, 4:8, 2:8); or mixed-N:M on average.",
        short="-p",
        replaces=_TARGET,
    )
    method_options: Mapping[str, Any] | None = option(None, "For the method, such as block=64.", flag="--method-option")
    allocation_options: Mapping[str, Any] | None = option(
        None,
        "For the allocation, such as strength=0.1, granularity=block.",
        flag="--allocation-option",
        reads=("text", "database"),
    )
    pattern_options: Mapping[str, Any] | None = option(
        None, "For a mixed pattern, such as strength=1, n_max=4, rule=marginal.", flag="--pattern-option"
    )
    reconstruct: bool = option(False, "Solve the kept weights of each mask by least squares: better at high sparsity.")
    quantize: Literal["int8", "int4"] | None = option(
        None, "Quantise the kept weights in the pruning sweep, so that later columns compensate for both errors."
    )
    quantize_group: Literal["32", "64", "128"] = option(
        "32", "Columns that share a scale of --quantize; GGUF files need 32.", only_with="quantize"
    )
    lm_head: bool = option(
        False, "Prune the output head, too, like one more layer behind the last; one that is tied cannot be pruned."
    )
    plan: SparsityPlan | None = None
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)

    @property
    def head(self) -> bool:
        """Whether the output head is pruned: that is asked for, or the plan says it."""
        return self.lm_head or (self.plan is not None and self.plan.has_head)

    @property
    def grid(self) -> Grid | None:
        """What kept weights are rounded to; None leaves them as they are."""
        return None if self.quantize is None else Grid(KINDS[self.quantize], int(self.quantize_group))


@dataclass(frozen=True)
class RecoverOptions(Options):
    """Everything that recovery decides.

    Attributes:
        data: the text to train on; None for methods that do not train.
        training: values of :class:`TrainingOptions`.
    """

    method: str = option(
        "losa",
        "Recover quality: {choices}.",
        flag="--recover",
        choices=RECOVERIES.names,
        replaces=("method", "options", "training"),
    )
    options: Mapping[str, Any] | None = option(
        None, "For the recovery method, such as steps=5.", flag="--recover-option"
    )
    data: DataOptions | None = None
    training: Mapping[str, Any] | None = option(
        None, "For training, such as learning_rate=2e-4.", flag="--train-option"
    )
    seed: int = seed_option("Seed of all random choices.")
    loss: Loss = option(
        "ce",
        "What training minimises: `ce` the text's cross-entropy, `kl` the divergence from the dense model's "
        "predictions, or `both`.",
    )

    @property
    def texts(self) -> tuple[str, ...]:
        """The text to train on; empty for methods that do not train."""
        return () if self.data is None else (self.data.data,)


# What the command that only recovers calls its options; elsewhere they have their own flags.
RECOVER_FLAGS = {"method": ("--method", "-m")}


@dataclass(frozen=True)
class ImportOptions(Options):
    """How a file becomes a folder."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Type of the stored weights; auto keeps the file's own, and float32 (exact) for quantised ones.",
    )


@dataclass(frozen=True)
class DemoOptions(SpeedOptions):
    """What the demo does."""

    model: str | None = option(
        None,
        "What to run on: smollm2 (135 M weights, fetched once), a model folder or a hub id.",
        unset="the small model that is shipped",
        reads=True,
    )
    train: bool = option(
        False, "Train the small model from scratch on this Python's library instead of using the shipped one."
    )
    sparsities: tuple[float, ...] = like(
        PruneOptions, "sparsity", (), unset="0.5, 0.7, 0.9; above 50 M weights 0.5, 0.6, 0.7"
    )
    method: str = like(PruneOptions, "method", "alps")
    allocation: str = like(PruneOptions, "allocation", "uniform")
    samples: int | None = like(CalibrationOptions, "sequences", None, unset="64; above 50 M weights 16")
    tasks: tuple[str, ...] = like(TaskOptions, "names")
    preset: str = option("default", "The small model: default (shipped) or tiny (trained in seconds).")
    profile: bool = like(BenchmarkOptions, "profile")
    probe: bool = option(True, "If layers are narrow, also measure the speed of a wider random model.")


@dataclass(frozen=True)
class DeployOptions(SpeedOptions):
    """What ``deploy`` searches through and how it judges.

    Attributes:
        within: growth of perplexity that is allowed, ``5%`` or ``0.05``.
        held_out: the text to judge on; None takes the test split of the calibration text's set.
        recovery: also train at the rates above the highest one that is within the bound without training.
    """

    target: str = option(
        CPU,
        "What to deploy for: {choices}; cpu is the best runtime of this machine.",
        flag="--for",
        choices=lambda: (CPU, *AIMS),
    )
    within: str = option("5%", "Allowed increase of the perplexity, such as 5%.")
    rates: tuple[float, ...] = option((0.3, 0.4, 0.5, 0.6, 0.7, 0.8), "Sparsities to choose from.", flag="--rate")
    methods: tuple[str, ...] = like(
        PruneOptions, "method", ("wanda", "sparsegpt", "alps"), help="Pruning methods to choose from: {choices}."
    )
    allocations: tuple[str, ...] = like(
        PruneOptions, "allocation", ("uniform", "dlp"), help="Allocations to choose from: {choices}."
    )
    held_out: str | None = option(
        None, "Text to measure quality on.", unset="the test split of the calibration text's set", reads=True
    )
    windows: int = like(TextOptions, "max_windows", 32, flag="--windows")
    context: int | None = like(EvalOptions, "context", unset="min(512, positions)")
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    recovery: RecoverOptions | None = None


@dataclass(frozen=True)
class PreviewOptions(Options):
    """Whether ``deploy`` only says what it would do."""

    dry_run: bool = option(False, "Only show the steps, with rough times.")


@dataclass(frozen=True)
class SweepOptions(Options):
    """How a sweep is run, and what is picked from it."""

    jobs: int = option(1, "Cells that run at once.", short="-j", at_least=1)
    on: Literal["local", "ray"] = option(
        "local", "local: processes of this machine; ray: a cluster that shares the output folder."
    )
    pick: str | None = option(None, "Name the cell to ship: 'smallest within 5 % of dense' or 'best below 300 MB'.")


@dataclass(frozen=True)
class InspectOptions(Options):
    """What a folder is compared with."""

    against: Path | None = option(None, "Compare the folder with this one: configuration, tensors, zeros and masks.")


@dataclass(frozen=True)
class PictureOptions(Options):
    """What ``inspect`` draws."""

    plot: Path | None = option(None, "Also draw the plans into this .svg or .png.", writes=True)
    mask: Path | None = option(None, "Also draw the mask of one matrix into this .svg or .png.", writes=True)
    module: str | None = option(
        None,
        "With --mask: the matrix, by the end of its name.",
        unset="the one with the largest loss",
        only_with="mask",
    )


@dataclass(frozen=True)
class CardOptions(Options):
    """What a model card is made from."""

    evaluations: tuple[Path, ...] = option(
        (), "Result of eval -o, of this folder or its base model.", flag="--eval", repeated=True
    )
    overwrite: bool = option(
        False, "Replace a README.md that was edited or that sparsedeploy did not write; a copy is kept."
    )


@dataclass(frozen=True)
class PushOptions(Options):
    """How a folder is sent to a hub."""

    private: bool = option(False, "Make a new repository private.")
    message: str | None = option(None, "Message of the commit.")
    overwrite: bool = option(False, "Replace the contents of the repository, in a new commit.")


# The sections of a recipe and of a manifest's request.
SECTIONS: dict[str, type[Options]] = {
    "prune": PruneOptions,
    "calibration": CalibrationOptions,
    "recover": RecoverOptions,
    "train": DataOptions,
}


def request_of(
    prune: PruneOptions, recover: RecoverOptions | None = None, *, reads_text: bool
) -> dict[str, dict[str, Any]]:
    """Everything that was asked for, as plain data in the sections of a recipe."""
    if (plan := prune.plan) is not None:
        prune = replace(
            prune,
            sparsity=plan.sparsity,
            pattern=plan.pattern,
            pattern_options=plan.details.get("mixed"),
            allocation=plan.allocation,
            allocation_options=plan.options,
            lm_head=plan.has_head,
        )
    request = {"prune": _section(prune)}
    if reads_text:
        request["calibration"] = _section(prune.calibration)
    return request if recover is None else {**request, **recovery_request(recover)}


def rounding_of(prune: PruneOptions) -> dict[str, Any]:
    """The part of a pruning request that is about rounding."""
    return {"quantize": prune.quantize, "quantize_group": prune.quantize_group}


def recovery_request(recover: RecoverOptions) -> dict[str, dict[str, Any]]:
    """The part of a request that is about recovery."""
    request = {"recover": _section(recover)}
    return request if recover.data is None else {**request, "train": _section(recover.data)}


def _section(options: Any) -> dict[str, Any]:
    """The values of a section, without the sections and plans inside it and without what changes no result."""
    left_out = {item.name for item in described(type(options)) if item.section or not item.facts.recorded}
    return {name: value for name, value in plain_options(options).items() if name not in left_out}
