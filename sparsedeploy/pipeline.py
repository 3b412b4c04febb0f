"""The pipeline: calibrate, allocate, prune, write. Each step takes plain data and gives plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.allocation import ALLOCATORS, plan_from_shares
from sparsedeploy.calibration.documents import load_documents
from sparsedeploy.calibration.driver import LayerDriver
from sparsedeploy.calibration.samples import CalibrationSet, default_length, sample_tokens
from sparsedeploy.checkpoint.writer import write_checkpoint
from sparsedeploy.errors import UserError
from sparsedeploy.folders import check_writable
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.loading import load_config, load_model, load_tokenizer, resolve_device, resolve_model
from sparsedeploy.models.structure import check_finite, find_decoder_stack
from sparsedeploy.plan import NM, ModuleShape, SparsityPlan, check_sparsity
from sparsedeploy.pruning import PRUNERS
from sparsedeploy.pruning.base import apply_mask


@dataclass(frozen=True)
class CalibrationOptions:
    """Which text is measured.

    Attributes:
        length: tokens per sequence; None takes min(2048, the model's positions).
        batch_size: sequences per layer call; changes speed and memory, not results.
    """

    data: str = "c4"
    field: str = "text"
    sequences: int = 128
    length: int | None = None
    seed: int = 0
    batch_size: int = 1


@dataclass(frozen=True)
class PruneOptions:
    """Everything that ``prune`` decides.

    Attributes:
        sparsity: global fraction of zeros; None takes the N:M pattern's own.
        pattern: ``unstructured`` or ``N:M`` (N kept).
        plan: a ready plan, in place of ``sparsity``, ``pattern`` and ``allocation``.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    method: str = "wanda"
    method_options: Mapping[str, Any] | None = None
    allocation: str = "uniform"
    allocation_options: Mapping[str, Any] | None = None
    plan: SparsityPlan | None = None
    calibration: CalibrationOptions = CalibrationOptions()


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
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Prune a model folder or hub id into ``output`` and return the new checkpoint's manifest.

    Raises:
        UserError: any input that cannot be used; ``output`` then does not exist or is as it was.
    """
    sparsity, pattern = resolve_pattern(options.sparsity, options.pattern) if options.plan is None else (0.0, None)
    pruner = PRUNERS.get(options.method)
    pruner_options = pruner.make_options(options.method_options)
    allocator = ALLOCATORS.get(options.allocation)
    allocator_options = allocator.make_options(options.allocation_options)
    check_writable(output, overwrite)
    on = resolve_device(device)
    folder = resolve_model(source)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    sha256 = model_sha256(folder)
    if options.plan is not None and options.plan.model_sha256 not in (None, sha256):
        raise UserError(
            "the plan was made for another model (its hash differs)", "Make it again: sparsedeploy allocate."
        )
    needs_data = pruner.traits["needs"] != "none" or (options.plan is None and allocator.traits["needs"] != "none")
    calibration = (
        calibration_set(folder, config, options.calibration, trust_remote_code=trust_remote_code)
        if needs_data
        else None
    )
    model = load_model(folder, dtype=dtype, device=on, trust_remote_code=trust_remote_code)
    batch_size = options.calibration.batch_size
    plan = options.plan or make_plan(
        model, calibration, sparsity, pattern, options.allocation, allocator_options, sha256, batch_size
    )
    pruned = prune_model(model, calibration, plan, options.method, pruner_options, batch_size)
    return write_checkpoint(
        folder,
        output,
        linears=find_decoder_stack(model).all_linears(),
        masks=pruned.masks,
        plan=plan,
        method=options.method,
        options=asdict(pruner_options),
        losses=pruned.losses,
        calibration=calibration.describe() if calibration else None,
        source_name=source,
        overwrite=overwrite,
    )


def resolve_pattern(sparsity: float | None, pattern: str) -> tuple[float, NM | None]:
    """The target and the fixed N:M pattern, if any.

    Raises:
        UserError: neither given, a target outside [0, 1), or one that the pattern contradicts.
    """
    nm = None if pattern == "unstructured" else NM.parse(pattern)
    if sparsity is not None:
        check_sparsity(sparsity)
    if nm is None:
        if sparsity is None:
            raise UserError("no sparsity given", "Add --sparsity 0.7 (the fraction of zeros), or --pattern 2:4.")
        return sparsity, None
    if sparsity is not None and abs(sparsity - nm.sparsity) > 1e-6:
        raise UserError(
            f"pattern {nm} keeps {nm.n} of {nm.m}: {nm.sparsity:g} sparsity, not {sparsity:g}",
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


def model_layers(model: nn.Module) -> list[list[ModuleShape]]:
    """The shapes of the prunable linears, layer by layer."""
    stack = find_decoder_stack(model)
    return [
        [ModuleShape(name, linear.out_features, linear.in_features) for name, linear in stack.linears(index).items()]
        for index in range(len(stack.layers))
    ]


@torch.no_grad()
def make_plan(
    model: nn.Module,
    calibration: CalibrationSet | None,
    sparsity: float,
    pattern: NM | None,
    allocation: str,
    options: Any,
    sha256: str | None = None,
    batch_size: int = 1,
) -> SparsityPlan:
    """Measure the dense model with an allocator and meet the budget; the model is not changed.

    Raises:
        UserError: a target or pattern that the allocation or the shapes cannot meet.
    """
    method = ALLOCATORS.get(allocation)
    allocator = method.function(options)
    layers = model_layers(model)
    measured: list[Any] = []
    if method.traits["needs"] == "none":
        measured = [None] * len(layers)
    else:
        driver = LayerDriver(model, _tokens(calibration), batch_size=batch_size)
        with progress.bar(f"allocate ({allocation})", len(driver), "layers") as advance:
            for layer in driver.walk(method.traits["needs"], changes_weights=False):
                measured.append(allocator.measure(layer))
                advance()
    shares = allocator.shares(measured, layers, sparsity)
    return plan_from_shares(
        shares,
        layers,
        sparsity,
        allocation=allocation,
        pattern=pattern,
        options=asdict(options),
        model_sha256=sha256,
    )


@torch.no_grad()
def prune_model(
    model: nn.Module,
    calibration: CalibrationSet | None,
    plan: SparsityPlan,
    method: str,
    options: Any,
    batch_size: int = 1,
) -> PrunedModules:
    """Prune a model in place, layer by layer, each on the inputs that the pruned layers before it give.

    Raises:
        UserError: a plan for other modules, or weights or activations that are not finite.
    """
    pruner = PRUNERS.get(method)
    needs = pruner.traits["needs"]
    plan.check_modules([shape for layer in model_layers(model) for shape in layer])
    targets = plan.by_name
    result = PrunedModules({}, {})

    def prune_module(name: str, linear: nn.Linear, statistics: Any) -> None:
        pruned = pruner.function(linear.weight.data, statistics, targets[name], options)
        linear.weight.data.copy_(apply_mask(pruned.weight, pruned.mask))
        result.masks[name] = pruned.mask.cpu()
        if pruned.loss is not None:
            result.losses[name] = pruned.loss

    if needs == "none":
        stack = find_decoder_stack(model)
        for name, linear in progress.track(stack.all_linears().items(), f"prune ({method})", unit="modules"):
            check_finite(name, linear.weight)
            prune_module(name, linear, None)
        return result
    driver = LayerDriver(model, _tokens(calibration), batch_size=batch_size)
    with progress.bar(f"prune ({method})", len(driver), "layers") as advance:
        for layer in driver.walk(needs, changes_weights=True):
            for name, linear in layer.linears.items():
                prune_module(name, linear, layer.statistics[name])
            advance()
    return result


def _tokens(calibration: CalibrationSet | None) -> torch.Tensor:
    if calibration is None:
        raise UserError("this method measures calibration text and none was given", "Add --data.")
    return calibration.tokens
