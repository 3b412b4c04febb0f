"""The job ``prune``: calibrate, allocate, prune layer by layer, write."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch

from sparsedeploy.allocation import model_layers
from sparsedeploy.calibration.samples import CalibrationSet
from sparsedeploy.checkpoint.journal import Journal, journalled_folder
from sparsedeploy.checkpoint.manifest import MANIFEST, Manifest, load_manifest
from sparsedeploy.checkpoint.masks import FILE as MASKS
from sparsedeploy.checkpoint.masks import load_masks
from sparsedeploy.checkpoint.tensor_writer import TensorWriter
from sparsedeploy.checkpoint.writer import Provenance, complete
from sparsedeploy.errors import UserError
from sparsedeploy.folders import check_free_space, claim
from sparsedeploy.memory import use_huge_pages
from sparsedeploy.models.layers import StreamedLayers
from sparsedeploy.models.stored_names import stored_slices
from sparsedeploy.plan import SparsityPlan
from sparsedeploy.processes import Processes, local_device, process_group
from sparsedeploy.pruning.layers import losses_of, prune_layers
from sparsedeploy.version import __version__
from sparsedeploy.workflows.options import PruneOptions, RunOptions, request_of, rounding_of
from sparsedeploy.workflows.plan import Prepared, choose_plan, model_to_measure, prepare, text_read


def prune(
    source: str,
    output: Path,
    options: PruneOptions,
    run: RunOptions = RunOptions(),
    *,
    drawn: Callable[[], CalibrationSet] | None = None,
) -> Manifest:
    """Prune a model folder or hub id into ``output`` and return the new checkpoint's manifest.

    A pruned checkpoint with ``quantize`` and without a target keeps its masks, and its weights are rounded.

    Memory holds the embeddings, one decoder layer and the activations of the calibration text; never the whole model.

    Args:
        drawn: the calibration sequences that ``options.calibration`` asks for, where somebody has them already.

    Raises:
        UserError: any input that cannot be used; ``output`` then does not exist or is as it was.
    """
    use_huge_pages()
    device = local_device(run.torch_device)
    run = replace(run, device=str(device))
    before = pruned_before(source, options)
    if before is not None:
        options = replace(options, plan=replace(before.plan, model_sha256=None))
    read = (source, *text_read(options))
    with process_group(device) as processes, ExitStack() as stack:
        if processes.main:
            stack.enter_context(claim(output, overwrite=run.overwrite, resume=run.resume, inputs=read))
        return _prune(source, output, options, run, processes, before, drawn)


def pruned_before(source: str, options: PruneOptions) -> Manifest | None:
    """The manifest of a checkpoint whose weights are only to be rounded: nothing was asked for but --quantize."""
    asks = options.sparsity is not None or options.pattern != PruneOptions.pattern or options.plan is not None
    if options.quantize is None or asks or not (Path(source) / MANIFEST).exists():
        return None
    manifest = load_manifest(Path(source))
    if manifest.quantization is not None:
        raise UserError(f"{source} is quantised already", "Quantise the checkpoint that it was made from.")
    return manifest


def _prune(
    source: str,
    output: Path,
    options: PruneOptions,
    run: RunOptions,
    processes: Processes,
    before: Manifest | None,
    drawn: Callable[[], CalibrationSet] | None,
) -> Manifest:
    """:func:`prune` on one of possibly several processes; the first one writes."""
    prepared = prepare(source, options, run, drawn=drawn)
    folder, calibration, layers = prepared.folder, prepared.calibration, prepared.layers()
    slices = stored_slices(layers.model, layers.files, options.head)
    if options.plan is not None:
        options.plan.check_modules([shape for layer in model_layers(layers) for shape in layer])
    request = {
        **prepared.request(),
        "dtype": str(layers.dtype),
        "device": layers.device.type,
        "processes": processes.count,
        "torch": torch.__version__,
        "sparsedeploy": __version__,
    }
    place: AbstractContextManager[Journal | None] = nullcontext()
    if processes.main:
        place = journalled_folder(output, request, resume=run.resume, overwrite=run.overwrite)
    with place as journal:
        state = (journal.folder, journal.plan, journal.finished) if journal else (Path(), None, 0)
        making, known, finished = processes.broadcast_object(state)
        if known is not None:
            plan = SparsityPlan.from_dict(known)
        elif options.plan is not None:
            plan = options.plan
        else:
            plan = _shared_plan(prepared, layers, processes)
        writer = TensorWriter(layers.files, making, plan.targets, slices, options.grid)
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
            processes=processes,
            stored={target.name: slices[target.name][0].tensor.dtype for target in plan.targets},
            finished=finished,
            reconstruct=options.reconstruct,
            grid=options.grid,
            masks=load_masks(folder / MASKS, {t.name: t.columns for t in plan.targets}) if before else None,
        ):
            if journal is not None:
                for name, module in pruned.modules.items():
                    writer.put(name, module.weight, module.mask, module.scales)
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
                request_of(options, reads_text=calibration is not None),
                dtype=str(layers.dtype).removeprefix("torch."),
                grid=options.grid,
            )
            if before is not None:
                asked = {**before.request.get("prune", {}), **rounding_of(options)}
                provenance = replace(
                    provenance,
                    source_name=before.source.name,
                    plan=before.plan,
                    method=before.method,
                    options=before.options,
                    calibration=before.calibration or prepared.described,
                    request={**before.request, "prune": asked},
                    recovery=before.recovery,
                    engine=before.engine,
                )
            manifest = complete(folder, journal.folder, slices, provenance, journal.losses)
        written = processes.broadcast_object(manifest)
        assert written is not None, "the first process writes"
        return written


def _shared_plan(prepared: Prepared, layers: StreamedLayers, processes: Processes) -> SparsityPlan:
    """The plan of all processes: the first one's, as each one's own sums may differ in their last bits.

    They measure together; a search prunes whole copies of the model, and only the first one does that.
    """
    assert prepared.choice is not None
    plan = None
    if not prepared.choice.searches:
        plan = choose_plan(model_to_measure(prepared, layers), prepared, processes)
    elif processes.main:
        plan = choose_plan(model_to_measure(prepared, layers), prepared)
    plan = processes.broadcast_object(plan)
    assert plan is not None
    return plan
