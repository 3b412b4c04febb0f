"""Check a request, read what it needs, and choose the sparsity plan."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsedeploy.allocation import ALLOCATORS, MixedOptions, allocate, model_layers
from sparsedeploy.allocation.allocate import check_pattern, effective_needs
from sparsedeploy.allocation.auto import SearchOptions
from sparsedeploy.allocation.base import Search
from sparsedeploy.calibration.documents import content_sha256
from sparsedeploy.calibration.samples import CalibrationSet, default_length
from sparsedeploy.calibration.text import calibration_set
from sparsedeploy.checkpoint.manifest import CalibrationRecord
from sparsedeploy.conversion import build_options
from sparsedeploy.errors import UserError
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.layers import LayerSource, ResidentLayers, StreamedLayers
from sparsedeploy.models.loading import load_asked, load_config, resolve_model
from sparsedeploy.models.low_rank import refuse_unmerged
from sparsedeploy.models.options import LoadOptions
from sparsedeploy.models.tensor_files import TensorFiles
from sparsedeploy.models.tokenizer import check_tokens, load_tokenizer
from sparsedeploy.plan import NM, MixedNM, SparsityPlan, check_sparsity, parse_pattern
from sparsedeploy.processes import SINGLE_PROCESS, Processes
from sparsedeploy.pruning import PRUNERS
from sparsedeploy.pruning.layers import prune_model
from sparsedeploy.quality.perplexity import perplexity, text_windows
from sparsedeploy.version import __version__
from sparsedeploy.workflows.options import PruneOptions
from sparsedeploy.workflows.search import search_plan


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
        """Whether making the plan prunes copies of the model and compares them."""
        trait = ALLOCATORS.get(self.name).traits.get("searches", False)
        return bool(trait(self.options) if callable(trait) else trait)

    @property
    def compares_levels(self) -> bool:
        """Whether the plan comes from a level database."""
        return isinstance(self.options, SearchOptions)


def resolve_allocation(options: PruneOptions, default: str = "uniform") -> AllocationChoice:
    """Check target, pattern, allocation and their options against each other.

    Args:
        default: the allocation where none is asked for.

    Raises:
        UserError: what cannot be or does not go together.
    """
    sparsity, pattern = resolve_pattern(options.sparsity, options.pattern)
    name = options.allocation or default
    allocation_options = ALLOCATORS.get(name).make_options(options.allocation_options)
    if options.allocation is not None:
        check_pattern(name, allocation_options, pattern)
    mixed = build_options("a mixed pattern", MixedOptions, options.pattern_options or {})
    if options.pattern_options and not isinstance(pattern, MixedNM):
        raise UserError(f"pattern {options.pattern} has no options", "They belong to mixed-N:M patterns.")
    return AllocationChoice(sparsity, pattern, name, allocation_options, mixed)


@dataclass(frozen=True)
class Prepared:
    """A request that was checked, with its model found and its calibration text read.

    Attributes:
        choice: what decides the plan; None where the options hold a ready one.
        sha256: of the model.
        calibration: None where nothing reads it.
    """

    options: PruneOptions
    load: LoadOptions
    folder: Path
    config: Any
    sha256: str
    choice: AllocationChoice | None
    pruner_options: Any
    calibration: CalibrationSet | None

    def layers(self) -> StreamedLayers:
        """The model's layers, one at a time."""
        load = self.load
        return StreamedLayers(
            self.folder,
            device=load.torch_device,
            dtype=load.torch_dtype,
            trust_remote_code=load.trust_remote_code,
            head=self.options.head,
        )

    @property
    def described(self) -> CalibrationRecord | None:
        """The calibration text, for a manifest."""
        return self.calibration.describe() if self.calibration else None

    def request(self) -> dict[str, Any]:
        """What decides the pruned weights: a resumed run must ask for the same."""
        plan = self.options.plan
        selected = getattr(self.choice.options, "text", None) if self.choice is not None else None
        return {
            "model_sha256": self.sha256,
            "plan": asdict(self.choice) if self.choice is not None else plan.to_dict() if plan else None,
            "method": self.options.method,
            "method_options": asdict(self.pruner_options),
            "reconstruct": self.options.reconstruct,
            "quantize": asdict(grid) if (grid := self.options.grid) else None,
            "lm_head": self.options.head,
            "calibration": asdict(described) if (described := self.described) else None,
            "accumulate": self.options.calibration.accumulate,
            "selection": content_sha256(selected) if selected else None,
        }

    def level_identity(self, model: nn.Module) -> dict[str, Any]:
        """What decides a level of the database besides its rate."""
        first = next(model.parameters())
        return {
            "model_sha256": self.sha256,
            "method": self.options.method,
            "method_options": asdict(self.pruner_options),
            "reconstruct": self.options.reconstruct,
            "quantize": asdict(grid) if (grid := self.options.grid) else None,
            "calibration": asdict(described) if (described := self.described) else None,
            "accumulate": self.options.calibration.accumulate,
            "dtype": str(first.dtype),
            "device": first.device.type,
            "sparsedeploy": __version__,
        }

    def selection_windows(self, text: str | None, split: str, limit: int) -> torch.Tensor:
        """The windows that a search compares its trials on, int64 ``[windows, length]``.

        Args:
            text: None takes the calibration text's own source.

        Raises:
            UserError: no tokenizer, no text or too little, or a token that the model has no row for.
        """
        calibration = self.options.calibration
        data = text or calibration.data
        tokenizer = load_tokenizer(self.folder, trust_remote_code=self.load.trust_remote_code)
        length = calibration.length or default_length(self.config)
        windows = text_windows(data, tokenizer, length, field=calibration.field, split=split, limit=limit)
        check_tokens(windows, self.config.get_text_config(decoder=True).vocab_size, data)
        return windows


def prepare(
    source: str,
    options: PruneOptions,
    load: LoadOptions = LoadOptions(),
    *,
    prunes: bool = True,
    calibrates: bool = False,
    allocation: str = "uniform",
    drawn: Callable[[], CalibrationSet] | None = None,
) -> Prepared:
    """Check a request against its model and read what calibration text it needs.

    Args:
        prunes: False where only a plan is wanted.
        calibrates: read the text whatever the pruner and the allocation need.
        allocation: the one where none is asked for.
        drawn: the calibration sequences, where somebody has them already.

    Raises:
        UserError: any input that cannot be used.
    """
    choice = None if options.plan is not None else resolve_allocation(options, allocation)
    pruner = PRUNERS.get(options.method)
    pruner_options = pruner.make_options(options.method_options)
    folder = resolve_model(source)
    refuse_unmerged(folder)
    trust = load.trust_remote_code
    config = load_config(folder, trust_remote_code=trust)
    TensorFiles(folder)  # refuses what is not the model or is corrupt, before every byte is hashed
    sha256 = model_sha256(folder)
    if options.plan is not None and options.plan.model_sha256 not in (None, sha256):
        raise UserError(
            "the plan was made for another model (its hash differs)", "Make it again: sparsedeploy allocate."
        )
    calibration = None
    fits = options.reconstruct or options.grid is not None
    if calibrates or measures_text(choice, options.method, prunes=prunes, reconstruct=fits):
        draw = drawn or partial(calibration_set, folder, config, options.calibration, trust_remote_code=trust)
        calibration = draw()
    return Prepared(options, load, folder, config, sha256, choice, pruner_options, calibration)


def measures_text(
    choice: AllocationChoice | None, method: str, *, prunes: bool = True, reconstruct: bool = False
) -> bool:
    """Whether the allocation (None: there is a plan already) or the pruner reads calibration text.

    Args:
        prunes: False where only a plan is wanted.
    """
    prunes = prunes or (choice is not None and choice.searches)
    reads = reconstruct or PRUNERS.get(method).traits["needs"] != "none"
    return (prunes and reads) or (choice is not None and choice.needs_data)


def text_read(options: PruneOptions, *, calibrates: bool = False, allocation: str = "uniform") -> tuple[str, ...]:
    """The text that a pruning calibrates on or compares a search's trials on; empty where it reads none.

    Args:
        calibrates, allocation: see :func:`prepare`.

    Raises:
        UserError: see :func:`resolve_allocation`.
    """
    choice = None if options.plan is not None else resolve_allocation(options, allocation)
    compares = choice is not None and choice.searches and getattr(choice.options, "text", None) is None
    fits = options.reconstruct or options.grid is not None
    if calibrates or compares or measures_text(choice, options.method, reconstruct=fits):
        return (options.calibration.data,)
    return ()


def plan_model(source: str, options: PruneOptions, load: LoadOptions = LoadOptions()) -> SparsityPlan:
    """Make the plan that :func:`prune` would follow, without pruning.

    Raises:
        UserError: any input that cannot be used.
    """
    prepared = prepare(source, replace(options, plan=None), load, prunes=False)
    return choose_plan(model_to_measure(prepared), prepared)


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


def model_to_measure(prepared: Prepared, layers: StreamedLayers | None = None) -> nn.Module | LayerSource:
    """What :func:`choose_plan` measures: one layer at a time, but the whole model for a search, which prunes copies.

    Args:
        layers: the model's, where they are open already.
    """
    if prepared.choice is not None and prepared.choice.searches:
        return load_asked(prepared.folder, prepared.load)
    return layers or prepared.layers()


def choose_plan(
    model: nn.Module | LayerSource, prepared: Prepared, processes: Processes = SINGLE_PROCESS
) -> SparsityPlan:
    """The plan by measuring the dense model or, for a search, by pruning copies of it; the model is not changed.

    Raises:
        UserError: a target or pattern that the allocation or the shapes cannot meet, or too little text for a search.
    """
    options, choice = prepared.options, prepared.choice
    assert choice is not None, "there is a plan already"
    tokens = prepared.calibration.tokens if prepared.calibration else None
    batch_size = options.calibration.batch_size
    layers = ResidentLayers(model, options.head) if isinstance(model, nn.Module) else model

    def plan_with(allocation_options: Any, name: str = choice.name) -> SparsityPlan:
        return allocate(
            layers,
            tokens,
            choice.sparsity,
            choice.pattern,
            name,
            allocation_options,
            mixed=choice.mixed,
            model_sha256=prepared.sha256,
            batch_size=batch_size,
            accumulate=options.calibration.accumulation,
            processes=processes,
        )

    if not choice.searches:
        return plan_with(choice.options)
    assert isinstance(layers, ResidentLayers), "a search prunes whole copies of the model"
    dense = layers.model
    if choice.compares_levels:
        asked = choice.options
        return search_plan(
            layers,
            tokens,
            prepared.selection_windows(asked.text, asked.selection, asked.windows),
            choice.sparsity,
            choice.pattern,
            choice.name,
            asked,
            method=options.method,
            method_options=prepared.pruner_options,
            identity=prepared.level_identity(dense),
            reconstruct=options.reconstruct,
            grid=options.grid,
            mixed=choice.mixed,
            model_sha256=prepared.sha256,
            batch_size=batch_size,
            accumulate=options.calibration.accumulation,
        )

    def trial_on(text: str | None, split: str, limit: int) -> Callable[[SparsityPlan], float]:
        selection = prepared.selection_windows(text, split, limit)

        def trial(plan: SparsityPlan) -> float:
            candidate = copy.deepcopy(dense)
            prune_model(
                candidate,
                tokens,
                plan,
                options.method,
                prepared.pruner_options,
                batch_size,
                accumulate=options.calibration.accumulation,
                reconstruct=options.reconstruct,
                grid=options.grid,
            )
            try:
                return perplexity(candidate, selection, batch_size=batch_size or 1).perplexity
            except UserError:  # its only reason: the pruned model has diverged
                return math.inf

        return trial

    search = Search(choice.sparsity, choice.pattern, model_layers(layers), plan_with, trial_on)
    allocator = ALLOCATORS.get(choice.name).function(choice.options)
    plan, details = allocator.search(search)
    return replace(plan, details={**plan.details, "search": details})
