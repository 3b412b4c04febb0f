"""The job ``recover``: prune and recover a dense model in one run, or recover a checkpoint that is pruned already."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from sparsedeploy import progress
from sparsedeploy.allocation import MixedOptions
from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.calibration.text import recorded_options
from sparsedeploy.checkpoint.manifest import Manifest, load_manifest
from sparsedeploy.checkpoint.masks import FILE as MASKS
from sparsedeploy.checkpoint.masks import load_masks
from sparsedeploy.errors import UserError
from sparsedeploy.folders import check_writable, claim
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.layers import StreamedLayers
from sparsedeploy.models.loading import load_asked, load_config, resolve_model
from sparsedeploy.models.low_rank import FOLDER as ADAPTER
from sparsedeploy.options import one_of
from sparsedeploy.plan import parse_pattern
from sparsedeploy.processes import local_device, process_group, refuse_several
from sparsedeploy.pruning.layers import losses_of, prune_model
from sparsedeploy.recovery.base import RecoveryJob, check_masks
from sparsedeploy.registry import RECOVERIES, Method
from sparsedeploy.workflows.options import (
    PruneOptions,
    RecoverOptions,
    RecoverRunOptions,
    RunOptions,
    recovery_request,
    request_of,
    rounding_of,
)
from sparsedeploy.workflows.plan import choose_plan, prepare, resolve_allocation, text_read
from sparsedeploy.workflows.recovery_run import RecoveryRun, device_of, dtype_of


def prune_and_recover(
    source: str,
    output: Path,
    prune: PruneOptions,
    recover: RecoverOptions,
    run: RunOptions = RunOptions(),
) -> Manifest:
    """Make a sparse checkpoint of a dense model and recover its quality; returns the manifest.

    Raises:
        UserError: any input that cannot be used, or training that diverges; ``output`` then does not exist.
    """
    refuse_several("the training of a recovery")
    if prune.quantize is not None:
        raise UserError(
            "recovery moves the weights that --quantize rounds",
            f"Leave --quantize out, then: sparsedeploy prune {output} --quantize {prune.quantize} -o QUANTIZED.",
        )
    _refuse_head(prune.head)
    read = (source, *_text_read(prune, RECOVERIES.get(recover.method)), *recover.texts)
    with claim(output, overwrite=run.overwrite, resume=run.resume, inputs=read):
        return _from_dense(source, prune, RecoveryRun.of(output, recover, run))


def recover_checkpoint(
    checkpoint: Path,
    output: Path,
    recover: RecoverOptions,
    run: RecoverRunOptions = RecoverRunOptions(),
    *,
    calibration: Mapping[str, Any] | None = None,
) -> Manifest:
    """Recover a pruned checkpoint into ``output``; returns the new manifest.

    Methods that start from the dense model (LoSA, SparseLo) take the one that the manifest names and prune it anew as
    the checkpoint was pruned: by its plan, or, for a method that chooses the rates itself, to its target with its
    allocation; always with its pruner, options and calibration text.

    Args:
        calibration: values of :class:`CalibrationOptions` in place of the checkpoint's.

    Raises:
        UserError: no manifest, masks that do not match the weights, a dense model that is missing or another one.
    """
    method = RECOVERIES.get(recover.method)
    if method.traits["starts_from"] == "dense" or not method.traits["trains"]:
        refuse_several(f"the recovery {method.name}")
    on = local_device(run.torch_device)
    read: list[str | Path] = [checkpoint, *recover.texts]
    read += [run.dense] if run.dense else []
    read += [calibration["data"]] if calibration and "data" in calibration else []
    with process_group(on) as processes, ExitStack() as stack:
        if processes.main:
            stack.enter_context(claim(output, overwrite=run.overwrite, resume=run.resume, inputs=read))
        work = RecoveryRun.of(output, recover, replace(run, device=str(on)), processes)
        return _from_checkpoint(checkpoint, work, run.dense, calibration)


def _refuse_head(pruned: bool) -> None:
    """Recovery holds the masks of decoder layers only.

    Raises:
        UserError: the output head is pruned.
    """
    if pruned:
        raise UserError("recovery does not keep a pruned output head sparse", "Prune without --lm-head.")


def _text_read(prune: PruneOptions, method: Method[Any]) -> tuple[str, ...]:
    """The calibration text of a recovery from the dense model."""
    return text_read(
        prune, calibrates=method.traits["calibrates"], allocation=method.traits.get("allocation") or "uniform"
    )


def _from_checkpoint(
    checkpoint: Path, work: RecoveryRun, dense: str | None, calibration: Mapping[str, Any] | None
) -> Manifest:
    method, manifest = work.method, load_manifest(checkpoint)
    _refuse_head(manifest.plan.has_head)
    if (grid := manifest.quantization) is not None:
        progress.note(f"the weights leave their int{grid.bits} grid: round them again with prune --quantize")
    if (checkpoint / ADAPTER).is_dir():
        raise UserError(
            f"{checkpoint} has been recovered with adapters beside its weights",
            "Recover the checkpoint that it was made from.",
        )
    find = partial(_dense_folder, checkpoint, manifest, dense, method.name)
    if method.traits["starts_from"] == "pruned":
        return _from_pruned(checkpoint, manifest, work, find() if reads_dense(work.asked, method) else None)
    name, folder = dense or manifest.source.name, find()
    prune = _again(manifest, method, calibration or {})
    check_writable(work.output, work.run.overwrite, (folder, *_text_read(prune, method)))
    return _from_dense(name, prune, work)


def reads_dense(recover: RecoverOptions, method: Method[Any]) -> bool:
    """Whether a recovery of a pruned checkpoint also reads the dense model."""
    return method.traits["starts_from"] == "dense" or recover.loss != "ce"


def _dense_folder(checkpoint: Path, manifest: Manifest, dense: str | None, method: str) -> Path:
    """The dense model that a checkpoint was pruned from.

    Raises:
        UserError: it is missing, or another one.
    """
    name = dense or manifest.source.name
    try:
        folder = resolve_model(name)
    except UserError as error:
        raise UserError(
            f"{method} reads the dense model, which is not at {name}", "Say where it is: --dense FOLDER."
        ) from error
    if manifest.source.sha256 not in (None, model_sha256(folder)):  # None: a model in memory was pruned
        raise UserError(
            f"{name} is not the model that {checkpoint} was pruned from", "Name that model: --dense FOLDER."
        )
    return folder


def _again(manifest: Manifest, method: Method[Any], other: Mapping[str, Any]) -> PruneOptions:
    """The checkpoint's pruning, with calibration values of the caller's in place of its own.

    Raises:
        UserError: text is needed and there is none, or a pruning that the method cannot do again.
    """
    prune = _same_pruning(manifest)
    searched = "allocation" in method.traits and resolve_allocation(prune).searches
    if prune.reconstruct or searched:
        able = [one.name for one in RECOVERIES if one.traits["starts_from"] == "pruned"]
        how = "with --reconstruct" if prune.reconstruct else f"by the search {prune.allocation}"
        raise UserError(
            f"{method.name} prunes the dense model by itself, and the checkpoint was pruned {how}",
            f"Use a method that starts from the pruned weights: {one_of(able)}.",
        )
    if method.traits["calibrates"] and manifest.calibration is None and "data" not in other:
        raise UserError(f"{manifest.method} read no calibration text and {method.name} needs some", "Add --data.")
    calibration = prune.calibration
    if "data" in other:
        calibration = replace(calibration, field=CalibrationOptions.field)
    prune = replace(prune, calibration=replace(calibration, **other))
    return prune if "allocation" in method.traits else replace(prune, plan=manifest.plan)


def _same_pruning(manifest: Manifest) -> PruneOptions:
    """What prunes the dense model again as the checkpoint was pruned.

    The plan's own allocation and options stand for what was asked: of a search they hold what it found. Where no
    allocation was asked for, it is again left to the job.
    """
    plan, asked = manifest.plan, manifest.request.get("prune", {})
    calibration = CalibrationOptions()
    if manifest.calibration is not None:
        accumulate = manifest.request.get("calibration", {}).get("accumulate", calibration.accumulate)
        calibration = replace(recorded_options(manifest), accumulate=accumulate)
    spread = asked.get("allocation") is not None
    mixed = plan.pattern.startswith("mixed")
    return PruneOptions(
        sparsity=plan.sparsity,
        pattern=plan.pattern,
        pattern_options=(asked.get("pattern_options") or plan.details.get("mixed")) if mixed else None,
        method=manifest.method,
        method_options=manifest.options,
        allocation=plan.allocation if spread else None,
        allocation_options=plan.options if spread else None,
        reconstruct=bool(asked.get("reconstruct", False)),
        calibration=calibration,
    )


def _from_dense(source: str, prune: PruneOptions, work: RecoveryRun) -> Manifest:
    recover, method, run = work.asked, work.method, work.run
    own_allocation = method.traits.get("allocation")
    prepared = prepare(
        source,
        prune,
        run,
        calibrates=method.traits["calibrates"],
        allocation=own_allocation or "uniform",
    )
    folder, choice, calibration = prepared.folder, prepared.choice, prepared.calibration
    if own_allocation and (choice is None or choice.searches):
        raise UserError(
            f"{recover.method} chooses its rates at every step", "Leave out --plan, or a search for the allocation."
        )
    if method.traits["starts_from"] == "dense" and (prune.reconstruct or (choice and choice.compares_levels)):
        raise UserError(
            f"{recover.method} does its own pruning",
            "Leave out --reconstruct and a searched allocation; pass the plan that a search found with --plan.",
        )
    data = work.training_data(folder, prepared.config)
    state = work.state(prepared.request(), data) if method.traits["trains"] else None
    model = load_asked(folder, run)
    job = RecoveryJob(
        model=model,
        dense=lambda: StreamedLayers(
            folder, device=device_of(model), dtype=dtype_of(model), trust_remote_code=run.trust_remote_code
        ),
        dense_model=work.model_loader(folder, model),
        sparsity=choice.sparsity if choice else prune.plan.sparsity if prune.plan else 0.0,
        pattern=choice.pattern if choice else None,
        pruner=prune.method,
        pruner_options=prepared.pruner_options,
        plan=prune.plan,
        allocation=prune.allocation,
        allocation_options=choice.options if choice else None,
        mixed=choice.mixed if choice else MixedOptions(),
        calibration=calibration,
        batch_size=prune.calibration.batch_size,
        accumulate=prune.calibration.accumulation,
        data=data,
        loss=recover.loss,
        training=work.training,
        seed=recover.seed,
        state=state,
        model_sha256=prepared.sha256,
    )
    losses: Mapping[str, float] = {}
    if method.traits["starts_from"] == "pruned":
        if choice is not None:
            job.plan = choose_plan(model, prepared)
        assert job.plan is not None
        pruned = prune_model(
            model,
            calibration.tokens if calibration else None,
            job.plan,
            prune.method,
            prepared.pruner_options,
            job.batch_size,
            accumulate=job.accumulate,
            reconstruct=prune.reconstruct,
        )
        job.masks, losses = {name: module.mask for name, module in pruned.items()}, losses_of(pruned)
    return work.finish(
        folder,
        job,
        losses,
        source_name=source,
        pruning=(prune.method, asdict(prepared.pruner_options)),
        calibration=prepared.described,
        request=request_of(prune, recover, reads_text=calibration is not None),
    )


def _from_pruned(folder: Path, manifest: Manifest, work: RecoveryRun, dense: Path | None) -> Manifest:
    recover, run, plan = work.asked, work.run, manifest.plan
    config = load_config(folder, trust_remote_code=run.trust_remote_code)
    masks = load_masks(folder / MASKS, {target.name: target.columns for target in plan.targets})
    data = work.training_data(folder, config)
    request = {"model_sha256": model_sha256(folder), "dense_sha256": model_sha256(dense) if dense else None}
    model = load_asked(folder, run)
    job = RecoveryJob(
        model=model,
        dense=lambda: model,
        dense_model=work.model_loader(dense or folder, model),
        sparsity=plan.sparsity,
        pattern=parse_pattern(plan.pattern),
        pruner=manifest.method,
        pruner_options=None,
        plan=plan,
        masks=masks,
        data=data,
        loss=recover.loss,
        training=work.training,
        seed=recover.seed,
        model_sha256=plan.model_sha256,
        processes=work.processes,
    )
    check_masks(job.linears, masks, plan)
    job.state = work.state(request, data)
    asked = manifest.request
    if manifest.quantization is not None:  # the recovery undoes it
        asked = {**asked, "prune": {**asked.get("prune", {}), **rounding_of(PruneOptions())}}
    work.processes.broadcast_object(None)  # nobody reads the state before the first process has checked it
    return work.finish(
        folder,
        job,
        {name: module.loss for name, module in manifest.modules.items() if module.loss is not None},
        source_name=manifest.source.name,
        pruning=(manifest.method, manifest.options),
        calibration=manifest.calibration,
        request={**asked, **recovery_request(recover)},
        engine=replace(manifest.engine, surplus_zeros=0) if manifest.engine else None,
    )
