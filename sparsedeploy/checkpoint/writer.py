"""Write a pruned checkpoint: the source folder with the pruned tensors replaced and everything else byte for byte."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from sparsedeploy import progress
from sparsedeploy.checkpoint import masks as mask_file
from sparsedeploy.checkpoint.manifest import FORMAT, MANIFEST, RECIPE
from sparsedeploy.checkpoint.recipe import recipe_yaml
from sparsedeploy.errors import UserError
from sparsedeploy.folders import new_folder, write_json, write_text
from sparsedeploy.models.fingerprint import file_sha256, weight_files
from sparsedeploy.plan import SparsityPlan
from sparsedeploy.pruning.base import apply_mask
from sparsedeploy.version import __version__

# Weights in other formats would be loaded in place of the pruned ones; the rest is ours and is written anew.
_NOT_COPIED = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".safetensors")
_OURS = (MANIFEST, RECIPE, mask_file.FILE)


def write_checkpoint(
    source: Path,
    output: Path,
    *,
    linears: dict[str, nn.Linear],
    masks: dict[str, torch.Tensor],
    plan: SparsityPlan,
    method: str,
    options: dict[str, Any],
    losses: dict[str, float],
    calibration: dict[str, Any] | None,
    source_name: str,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the folder and return its manifest; the folder appears only when complete.

    Args:
        linears: the pruned modules by full name; their weights replace the source's tensors, in the source's dtype.
        masks: bool ``[rows, columns]`` by the same names, True where kept.

    Raises:
        UserError: a module without a tensor in the source, an existing output, or a disk that is full or read-only.
    """
    with new_folder(output, overwrite=overwrite) as staging:
        tensor_of = _tensor_names(source, list(linears))
        shards = weight_files(source)
        for shard in progress.track(shards, "write weights"):
            _write_shard(shard, staging / shard.name, tensor_of, linears, masks)
        _copy_rest(source, staging)
        mask_file.save_masks(staging / mask_file.FILE, masks)
        write_text(staging / RECIPE, recipe_yaml(plan, method, options))
        manifest = {
            "format": FORMAT,
            "sparsedeploy": __version__,
            "source": {"name": source_name, "sha256": plan.model_sha256},
            "method": method,
            "options": options,
            "calibration": calibration,
            "plan": plan.to_dict(),
            "achieved": _achieved(masks),
            "modules": {
                name: {
                    "shape": list(mask.shape),
                    "zeros": int((~mask).sum()),
                    "sparsity": 1 - mask.sum().item() / mask.numel(),
                    "loss": losses.get(name),
                    "tensor": tensor_of[name],
                }
                for name, mask in masks.items()
            },
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "safetensors": safetensors.__version__,
            },
        }
        manifest["files"] = {path.name: file_sha256(path) for path in sorted(staging.iterdir()) if path.is_file()}
        write_json(staging / MANIFEST, manifest)
    return manifest


def _tensor_names(source: Path, modules: list[str]) -> dict[str, str]:
    """Module name -> name of its weight in the files; checkpoints of a bare base model lack the first part."""
    stored: set[str] = set()
    for shard in weight_files(source):
        with safetensors.safe_open(shard, framework="pt") as file:
            stored.update(file.keys())
    names: dict[str, str] = {}
    for module in modules:
        candidates = (f"{module}.weight", f"{module.partition('.')[2]}.weight")
        found = next((name for name in candidates if name in stored), None)
        if found is None:
            raise UserError(
                f"{source} stores no tensor for {module}",
                "Save the model anew with transformers' save_pretrained, then prune that folder.",
            )
        names[module] = found
    return names


def _write_shard(
    shard: Path,
    target: Path,
    tensor_of: dict[str, str],
    linears: dict[str, nn.Linear],
    masks: dict[str, torch.Tensor],
) -> None:
    with safetensors.safe_open(shard, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    for module, name in tensor_of.items():
        if name in tensors:
            weight = linears[module].weight.detach().to("cpu", tensors[name].dtype)
            tensors[name] = apply_mask(weight, masks[module].cpu()).contiguous()
    save_file(tensors, target, metadata=metadata)


def _copy_rest(source: Path, staging: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in _NOT_COPIED and path.name not in _OURS:
            if path.name.endswith(".index.json") and not path.name.endswith(".safetensors.index.json"):
                continue
            shutil.copyfile(path, staging / path.name)


def _achieved(masks: dict[str, torch.Tensor]) -> float:
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / total
