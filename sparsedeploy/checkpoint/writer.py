"""Write a pruned checkpoint: the source folder with the pruned tensors replaced and everything else byte for byte."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import nn

from sparsedeploy import progress
from sparsedeploy.checkpoint import masks as mask_file
from sparsedeploy.checkpoint.card import CARD, checkpoint_card, kept_names, read_base
from sparsedeploy.checkpoint.evaluations import EVALUATION
from sparsedeploy.checkpoint.manifest import (
    MANIFEST,
    RECIPE,
    CalibrationRecord,
    EngineRecord,
    Manifest,
    ModuleRecord,
    RecoveryRecord,
    SliceRecord,
    SourceModel,
)
from sparsedeploy.checkpoint.recipe import recipe_yaml
from sparsedeploy.checkpoint.scales import FILE as SCALES
from sparsedeploy.checkpoint.tensor_writer import TensorWriter
from sparsedeploy.folders import JOURNAL, new_folder, write_json, write_text
from sparsedeploy.grid import Grid
from sparsedeploy.masks import apply_mask
from sparsedeploy.models.fingerprint import file_sha256
from sparsedeploy.models.low_rank import FOLDER as ADAPTER
from sparsedeploy.models.low_rank import LowRank, save_adapter
from sparsedeploy.models.stored_names import StoredSlice, stored_slices
from sparsedeploy.models.structure import find_decoder_stack
from sparsedeploy.models.tensor_files import TensorFiles
from sparsedeploy.models.weight_files import note_left_out, small_files
from sparsedeploy.plan import SparsityPlan
from sparsedeploy.reading import SOUND_COPY, read_object

# Written anew, or of another model.
_OURS = (MANIFEST, RECIPE, mask_file.FILE, SCALES, CARD, EVALUATION)


@dataclass(frozen=True)
class Provenance:
    """What led to a checkpoint, for its manifest.

    Attributes:
        source_name: the model as the user named it.
        method: the pruner; ``options`` its options.
        calibration: None when no text was read.
        request: everything that was asked for, in the sections of a recipe.
        recovery: what recovered quality after pruning, or None.
        engine: the program that pruned; None for this one.
        dtype: the type that the model was computed in; masks may differ between types.
        grid: what the kept weights are rounded to, or None.
    """

    source_name: str
    plan: SparsityPlan
    method: str
    options: dict[str, Any]
    calibration: CalibrationRecord | None
    request: dict[str, dict[str, Any]]
    recovery: RecoveryRecord | None = None
    engine: EngineRecord | None = None
    dtype: str | None = None
    grid: Grid | None = None


def write_checkpoint(
    source: Path,
    output: Path,
    provenance: Provenance,
    *,
    model: nn.Module,
    masks: Mapping[str, torch.Tensor],
    losses: Mapping[str, float],
    low_rank: Mapping[str, LowRank] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write the folder of a pruned model in memory and return its manifest; the folder appears only when complete.

    Args:
        model: its pruned weights replace the source's tensors, in the source's dtype.
        masks: bool ``[rows, columns]`` by the names of its linears, True where kept.
        low_rank: factors beside the weights, by module name; they go into an adapter folder.

    Raises:
        UserError: a module without a tensor in the source, an existing output, or a disk that is full or read-only.
    """
    with new_folder(output, overwrite=overwrite) as staging:
        files = TensorFiles(source)
        head = provenance.plan.has_head
        slices = stored_slices(model, files, head)
        writer = TensorWriter(files, staging, provenance.plan.targets, slices)
        writer.create()
        linears = find_decoder_stack(model, head).all_linears()
        for name in progress.track(list(masks), "write weights", unit="modules"):
            weight = linears[name].weight.detach()
            writer.put(name, apply_mask(weight, masks[name].to(weight.device)), masks[name])
        if low_rank:
            save_adapter(staging / ADAPTER, low_rank, output.name)
        return complete(source, staging, slices, provenance, losses)


def complete(
    source: Path,
    staging: Path,
    slices: Mapping[str, tuple[StoredSlice, ...]],
    provenance: Provenance,
    losses: Mapping[str, float],
) -> Manifest:
    """Add everything but weights and masks to a folder in the making and return its manifest."""
    plan = provenance.plan
    _copy_rest(source, staging)
    write_text(staging / RECIPE, recipe_yaml(plan, provenance.method, provenance.options))
    manifest = Manifest(
        source=SourceModel(provenance.source_name, plan.model_sha256),
        request=provenance.request,
        method=provenance.method,
        options=provenance.options,
        calibration=provenance.calibration,
        plan=plan,
        modules={
            target.name: ModuleRecord(
                target.rows,
                target.columns,
                target.zeros,
                losses.get(target.name),
                slices[target.name][0].tensor.name,
                _slice_records(slices[target.name]),
            )
            for target in plan.targets
        },
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
        engine=provenance.engine,
        dtype=provenance.dtype,
        recovery=provenance.recovery,
        quantization=provenance.grid,
        files={
            path.relative_to(staging).as_posix(): file_sha256(path)
            for path in sorted(staging.rglob("*"))
            if path.is_file() and path.name not in (JOURNAL, CARD)
        },
    )
    write_text(staging / CARD, checkpoint_card(read_base(source, provenance.source_name), manifest))
    write_json(staging / MANIFEST, manifest.to_json())
    return manifest


def _slice_records(slices: tuple[StoredSlice, ...]) -> tuple[SliceRecord, ...]:
    """How a module lies in the files, where it is not simply one tensor ``[rows, columns]``."""
    if len(slices) == 1 and not slices[0].transposed and slices[0].tensor.shape[:-1] == (slices[0].last,):
        return ()
    return tuple(
        SliceRecord(one.tensor.name, one.first, one.last, one.start - one.tensor.start, one.transposed)
        for one in slices
    )


def _copy_rest(source: Path, staging: Path) -> None:
    note_left_out(source)
    for name, kept in kept_names(source).items():
        progress.note(f"the base model's {name} is kept as {kept}")
        shutil.copyfile(source / name, staging / kept)
    for path in small_files(source):
        if path.name not in _OURS:
            shutil.copyfile(path, staging / path.name)
    config = read_object(staging / "config.json", fix=SOUND_COPY)
    if "quantization_config" in config:  # left over: weights that are quantised are not pruned
        del config["quantization_config"]
        write_json(staging / "config.json", config)
