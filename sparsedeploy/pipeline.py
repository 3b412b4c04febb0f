"""The pipeline: calibrate, allocate, prune, write. Each step takes plain data and gives plain data."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sparsedeploy.allocation import ALLOCATORS, MixedOptions, allocate, model_layers
from sparsedeploy.allocation.allocate import check_pattern, effective_needs
from sparsedeploy.allocation.atp import ATPOptions, search_beta, trial_betas
from sparsedeploy.calibration.documents import load_documents
from sparsedeploy.calibration.samples import CalibrationSet, default_length, sample_tokens
from sparsedeploy.checkpoint.journal import Journal, journalled_folder
from sparsedeploy.checkpoint.tensor_writer import TensorWriter
from sparsedeploy.checkpoint.writer import Provenance, complete
from sparsedeploy.errors import UserError
from sparsedeploy.evaluation.perplexity import perplexity, text_windows
from sparsedeploy.folders import check_free_space, check_writable
from sparsedeploy.memory import use_huge_pages
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.layers import LayerSource, ResidentLayers, StreamedLayers
from sparsedeploy.models.loading import load_config, load_model, load_tokenizer, resolve_device, resolve_model
from sparsedeploy.plan import NM, MixedNM, SparsityPlan, check_sparsity, parse_pattern
from sparsedeploy.pruning import PRUNERS
from sparsedeploy.pruning.base import Pruned
from sparsedeploy.pruning.run import prune_layers
from sparsedeploy.ranks import ALONE, Ranks, joined, local_device
from sparsedeploy.registry import build_options
from sparsedeploy.version import __version__


@dataclass(frozen=True)
class CalibrationOptions:
    """Which text is measured.

    Attributes:
        length: tokens per sequence; None takes min(2048, the model's positions).
        batch_size: sequences per layer call; changes speed and memory, not results. None chooses by free memory.
        accumulate: float32, or float64 for sums whose order does not show, on any number of processes.
    """

    data: str = "c4"
    field: str = "text"
    sequences: int = 128
    length: int | None = None
    seed: int = 0
    batch_size: int | None = None
    accumulate: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        if self.accumulate not in ("float32", "float64"):
            raise UserError(f"cannot accumulate in '{self.accumulate}'", "Use float32 or float64.")

    @property
    def accumulation(self) -> torch.dtype:
        """The type of ``accumulate``."""
        dtype: torch.dtype = getattr(torch, self.accumulate)
        return dtype


@dataclass(frozen=True)
class PruneOptions:
    """Everything that ``prune`` decides.

    Attributes:
        sparsity: global fraction of zeros; None takes the N:M pattern's own.
        pattern: ``unstructured``, ``N:M`` (N kept) or ``mixed-N:M`` (N kept on average).
        pattern_options: of a mixed pattern (:class:`sparsedeploy.allocation.MixedOptions`).
        plan: a ready plan, in place of ``sparsity``, ``pattern`` and ``allocation``.
        true_sequential: each linear of a layer is pruned on what the pruned ones before it give, in one forward pass
            instead of two; the activations of all sequences in the middle of a layer are in memory at once.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    pattern_options: Mapping[str, Any] | None = None
    method: str = "wanda"
    method_options: Mapping[str, Any] | None = None
    allocation: str = "uniform"
    allocation_options: Mapping[str, Any] | None = None
    plan: SparsityPlan | None = None
    calibration: CalibrationOptions = CalibrationOptions()
    true_sequential: bool = False


@dataclass(frozen=True)
class PrunedModules:
    """Masks (True = kept) and the pruner's own losses, by module name; the weights are in the model."""

    masks: dict[str, torch.Tensor]
    losses: dict[str, float]


def prune(
    source: str,
    output: Path,
    options: PruneOptions,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Prune a model folder or hub id into ``output`` and return the new checkpoint's manifest.

    Memory holds the embeddings, one decoder layer and the activations of the calibration text; never the whole model.

    Args:
        resume: go on with a run of the same request that was interrupted; the result is identical, byte for byte.

    Raises:
        UserError: any input that cannot be used; ``output`` then does not exist or is as it was.
    """
    use_huge_pages()
    on = local_device(resolve_device(device))
    with joined(on) as ranks:
        return _prune(source, output, options, on, dtype, resume, overwrite, trust_remote_code, ranks)


def _prune(
    source: str,
    output: Path,
    options: PruneOptions,
    device: torch.device,
    dtype: torch.dtype | None,
    resume: bool,
    overwrite: bool,
    trust_remote_code: bool,
    ranks: Ranks,
) -> dict[str, Any]:
    """:func:`prune` on one of possibly several processes; the first one writes."""
    check_writable(output, overwrite)
    prepared = prepare(source, options, trust_remote_code=trust_remote_code)
    folder, calibration = prepared.folder, prepared.calibration
    layers = StreamedLayers(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if options.plan is not None:
        options.plan.check_modules([shape for layer in model_layers(layers) for shape in layer])
    request = {
        **prepared.request(),
        "accumulate": options.calibration.accumulate,
        "dtype": str(dtype),
        "device": device.type,
        "processes": ranks.count,
        "torch": torch.__version__,
        "sparsedeploy": __version__,
    }
    place: AbstractContextManager[Journal | None] = nullcontext()
    if ranks.main:
        place = journalled_folder(output, request, resume=resume, overwrite=overwrite)
    with place as journal:
        state = (journal.folder, journal.plan, journal.finished) if journal else (Path(), None, 0)
        making, known, finished = ranks.tell(state)
        if known is not None:
            plan = SparsityPlan.from_dict(known)
        elif options.plan is not None:
            plan = options.plan
        else:
            plan = choose_plan(model_to_measure(prepared, device, dtype, layers), prepared, ranks)
        writer = TensorWriter(layers.files, making, plan.targets)
        if journal is not None and journal.plan is None:
            check_free_space(journal.folder, layers.files.size)
            writer.create()
            journal.record_plan(plan.to_dict())
        for index in range(finished):
            layers.redirect(index, making)
        for pruned in prune_layers(
            layers,
            calibration.tokens if calibration else None,
            plan,
            options.method,
            prepared.pruner_options,
            batch_size=options.calibration.batch_size,
            accumulate=options.calibration.accumulation,
            ranks=ranks,
            stored={target.name: layers.files.locate(f"{target.name}.weight").dtype for target in plan.targets},
            finished=finished,
            true_sequential=options.true_sequential,
        ):
            if journal is not None:
                for name, module in pruned.modules.items():
                    writer.put(name, module.weight, module.mask)
                writer.sync()
                journal.record_layer(pruned.index, losses_of(pruned.modules))
        manifest = None
        if journal is not None:
            provenance = Provenance(
                source,
                plan,
                options.method,
                asdict(prepared.pruner_options),
                prepared.described,
                true_sequential=options.true_sequential,
            )
            manifest = complete(folder, journal.folder, layers.files, provenance, journal.losses)
        return ranks.tell(manifest) or {}


@dataclass(frozen=True)
class AllocationChoice:
    """Everything that decides a plan, checked.

    Attributes:
        pattern: None for unstructured.
        options: of the allocation ``name``; ``mixed`` of a mixed pattern.
    """

    sparsity: float
    pattern: NM | MixedNM | None
    name: str
    options: Any
    mixed: MixedOptions

    @property
    def needs_data(self) -> bool:
        """Whether making the plan reads calibration text; a search prunes, and what pruning reads comes on top."""
        marginal = isinstance(self.pattern, MixedNM) and self.mixed.rule == "marginal"
        needs = effective_needs(ALLOCATORS.get(self.name).traits["needs"], marginal=marginal)
        return needs not in ("none", "weights")

    @property
    def searches(self) -> bool:
        return isinstance(self.options, ATPOptions) and self.options.search


def resolve_allocation(options: PruneOptions) -> AllocationChoice:
    """Check target, pattern, allocation and their options against each other.

    Raises:
        UserError: what cannot be or does not go together.
    """
    sparsity, pattern = resolve_pattern(options.sparsity, options.pattern)
    allocation_options = ALLOCATORS.get(options.allocation).make_options(options.allocation_options)
    check_pattern(options.allocation, allocation_options, pattern)
    mixed = build_options("a mixed pattern", MixedOptions, options.pattern_options or {})
    if options.pattern_options and not isinstance(pattern, MixedNM):
        raise UserError(f"pattern {options.pattern} has no options", "They belong to mixed-N:M patterns.")
    return AllocationChoice(sparsity, pattern, options.allocation, allocation_options, mixed)


@dataclass(frozen=True)
class Prepared:
    """A request that was checked, with its model found and its calibration text read.

    Attributes:
        choice: what decides the plan; None where the options hold a ready one.
        sha256: of the model.
        calibration: None where nothing reads it.
    """

    options: PruneOptions
    folder: Path
    config: Any
    sha256: str
    choice: AllocationChoice | None
    pruner_options: Any
    calibration: CalibrationSet | None
    trust_remote_code: bool

    @property
    def described(self) -> dict[str, Any] | None:
        """The calibration text, for a manifest."""
        return self.calibration.describe() if self.calibration else None

    def request(self) -> dict[str, Any]:
        """What decides the pruned weights: a resumed run must ask for the same."""
        plan = self.options.plan
        return {
            "model_sha256": self.sha256,
            "plan": asdict(self.choice) if self.choice is not None else plan.to_dict() if plan else None,
            "method": self.options.method,
            "method_options": asdict(self.pruner_options),
            "calibration": self.described,
            "true_sequential": self.options.true_sequential,
        }

    def selection_windows(self) -> torch.Tensor:
        """The windows that a search compares its trials on, int64 ``[windows, length]``.

        Raises:
            UserError: no tokenizer, no text or too little.
        """
        assert self.choice is not None
        asked, calibration = self.choice.options, self.options.calibration
        data = asked.text or calibration.data
        tokenizer = load_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)
        length = calibration.length or default_length(self.config)
        return text_windows(
            data, tokenizer, length, field=calibration.field, split=asked.selection, limit=asked.windows
        )


def prepare(
    source: str,
    options: PruneOptions,
    *,
    prunes: bool = True,
    calibrates: bool = False,
    trust_remote_code: bool = False,
) -> Prepared:
    """Check a request against its model and read what calibration text it needs.

    Args:
        prunes: False where only a plan is wanted.
        calibrates: read the text whatever the pruner and the allocation need.

    Raises:
        UserError: any input that cannot be used.
    """
    choice = None if options.plan is not None else resolve_allocation(options)
    pruner = PRUNERS.get(options.method)
    pruner_options = pruner.make_options(options.method_options)
    if options.true_sequential and pruner.traits["needs"] == "none":
        raise UserError(f"{options.method} reads no activations", "Leave --true-sequential out.")
    folder = resolve_model(source)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    sha256 = model_sha256(folder)
    if options.plan is not None and options.plan.model_sha256 not in (None, sha256):
        raise UserError(
            "the plan was made for another model (its hash differs)", "Make it again: sparsedeploy allocate."
        )
    prunes = prunes or (choice is not None and choice.searches)
    needs_text = (
        calibrates or (prunes and pruner.traits["needs"] != "none") or (choice is not None and choice.needs_data)
    )
    calibration = None
    if needs_text:
        calibration = calibration_set(folder, config, options.calibration, trust_remote_code=trust_remote_code)
    return Prepared(options, folder, config, sha256, choice, pruner_options, calibration, trust_remote_code)


def plan_model(
    source: str,
    options: PruneOptions,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> SparsityPlan:
    """Make the plan that :func:`prune` would follow, without pruning.

    Raises:
        UserError: any input that cannot be used.
    """
    on = resolve_device(device)
    prepared = prepare(source, replace(options, plan=None), prunes=False, trust_remote_code=trust_remote_code)
    return choose_plan(model_to_measure(prepared, on, dtype), prepared)


def resolve_pattern(sparsity: float | None, pattern: str) -> tuple[float, NM | MixedNM | None]:
    """The target and the N:M pattern, if any.

    Raises:
        UserError: neither given, a target outside [0, 1), or one that the pattern contradicts.
    """
    nm = parse_pattern(pattern)
    if sparsity is not None:
        check_sparsity(sparsity)
    if nm is None:
        if sparsity is None:
            raise UserError("no sparsity given", "Add --sparsity 0.7 (the fraction of zeros), or --pattern 2:4.")
        return sparsity, None
    if sparsity is not None and abs(sparsity - nm.sparsity) > 1e-6:
        kept = nm.n if isinstance(nm, NM) else nm.keep
        raise UserError(
            f"pattern {nm} keeps {kept:g} of {nm.m}: {nm.sparsity:g} sparsity, not {sparsity:g}",
            "Leave --sparsity out, or choose another pattern.",
        )
    return nm.sparsity, nm


def calibration_set(
    folder: Path, config: Any, options: CalibrationOptions, *, trust_remote_code: bool = False
) -> CalibrationSet:
    """Read, tokenise and sample the calibration text.

    Raises:
        UserError: no tokenizer, no text or too little, or sequences longer than the model's positions.
    """
    positions = getattr(config, "max_position_embeddings", None)
    length = options.length or default_length(config)
    if positions is not None and length > positions:
        raise UserError(
            f"calibration length {length} exceeds the model's {positions} positions", "Lower --calibration-length."
        )
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    documents = load_documents(options.data, field=options.field)
    return sample_tokens(
        documents, tokenizer, sequences=options.sequences, length=length, seed=options.seed, data=options.data
    )


def model_to_measure(
    prepared: Prepared, device: torch.device, dtype: torch.dtype | None, layers: StreamedLayers | None = None
) -> nn.Module | LayerSource:
    """What :func:`choose_plan` measures: one layer at a time, but the whole model for a search, which prunes copies.

    Args:
        layers: the model's, where they are open already.
    """
    trust = prepared.trust_remote_code
    if prepared.choice is not None and prepared.choice.searches:
        return load_model(prepared.folder, dtype=dtype, device=device, trust_remote_code=trust)
    return layers or StreamedLayers(prepared.folder, device=device, dtype=dtype, trust_remote_code=trust)


def choose_plan(model: nn.Module | LayerSource, prepared: Prepared, ranks: Ranks = ALONE) -> SparsityPlan:
    """The plan by measuring the dense model or, for a search, by pruning copies of it; the model is not changed.

    Raises:
        UserError: a target or pattern that the allocation or the shapes cannot meet, or too little text for a search.
    """
    options, choice, calibration = prepared.options, prepared.choice, prepared.calibration
    assert choice is not None, "there is a plan already"
    batch_size = options.calibration.batch_size

    def plan_with(allocation_options: Any) -> SparsityPlan:
        return make_plan(
            model,
            calibration,
            choice.sparsity,
            choice.pattern,
            choice.name,
            allocation_options,
            prepared.sha256,
            batch_size,
            choice.mixed,
            accumulate=options.calibration.accumulation,
            ranks=ranks,
        )

    if not choice.searches:
        return plan_with(choice.options)
    assert isinstance(model, nn.Module), "a search prunes whole copies of the model"
    dense, selection = model, prepared.selection_windows()

    def trial(plan: SparsityPlan) -> float:
        candidate = copy.deepcopy(dense)
        prune_model(
            candidate,
            calibration,
            plan,
            options.method,
            prepared.pruner_options,
            batch_size,
            true_sequential=options.true_sequential,
        )
        try:
            return perplexity(candidate, selection, batch_size=batch_size or 1).perplexity
        except UserError:  # its only reason: the pruned model has diverged
            return math.inf

    asked = choice.options
    betas = trial_betas(choice.sparsity, len(model_layers(model)), asked.step, asked.trials)
    found = search_beta(
        trial, lambda beta: plan_with(replace(asked, search=False, beta=beta)), betas, patience=asked.patience
    )
    return replace(
        found.plan,
        options=asdict(asked) | {"beta": found.beta},
        details={**found.plan.details, "search": {"selection": asked.selection, "trials": found.to_dict()}},
    )


def make_plan(
    model: nn.Module | LayerSource,
    calibration: CalibrationSet | None,
    sparsity: float,
    pattern: NM | MixedNM | None,
    allocation: str,
    options: Any,
    sha256: str | None = None,
    batch_size: int | None = None,
    mixed: MixedOptions | None = None,
    *,
    accumulate: torch.dtype = torch.float32,
    ranks: Ranks = ALONE,
) -> SparsityPlan:
    """Measure the dense model with an allocator and meet the budget; the model is not changed.

    Raises:
        UserError: a target or pattern that the allocation or the shapes cannot meet.
    """
    return allocate(
        model,
        calibration.tokens if calibration else None,
        sparsity,
        pattern,
        allocation,
        options,
        mixed=mixed,
        model_sha256=sha256,
        batch_size=batch_size,
        accumulate=accumulate,
        ranks=ranks,
    )


def prune_model(
    model: nn.Module,
    calibration: CalibrationSet | None,
    plan: SparsityPlan,
    method: str,
    options: Any,
    batch_size: int | None = None,
    *,
    true_sequential: bool = False,
) -> PrunedModules:
    """Prune a model in place, layer by layer, each on the inputs that the pruned layers before it give.

    Raises:
        UserError: a plan for other modules, or weights or activations that are not finite.
    """
    result = PrunedModules({}, {})
    tokens = calibration.tokens if calibration else None
    for layer in prune_layers(
        ResidentLayers(model), tokens, plan, method, options, batch_size=batch_size, true_sequential=true_sequential
    ):
        result.masks.update({name: pruned.mask.cpu() for name, pruned in layer.modules.items()})
        result.losses.update(losses_of(layer.modules))
    return result


def losses_of(modules: Mapping[str, Pruned]) -> dict[str, float]:
    """The losses of those modules whose pruner reports one."""
    return {name: pruned.loss for name, pruned in modules.items() if pruned.loss is not None}
