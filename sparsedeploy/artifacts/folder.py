"""Plain Hugging Face folders: what every export starts from, and what some runtimes load as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsedeploy.artifacts.description import (
    ARTIFACT_FILE,
    Artifact,
    Engine,
    Source,
    Sparsity,
    config_shapes,
    load_artifact,
)
from sparsedeploy.artifacts.traffic import folder_bytes
from sparsedeploy.errors import UserError
from sparsedeploy.paths import expand

if TYPE_CHECKING:
    from torch import nn

# The target of a folder that was not exported.
CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that can be exported, with its configuration and tokenizer."""

    folder: Path
    config: Any
    tokenizer: Any
    source: Source
    trust_remote_code: bool

    def load(self) -> nn.Module:
        """The model in float32.

        Raises:
            UserError: weights that are missing, broken or not finite.
        """
        import torch

        from sparsedeploy.models.loading import load_model

        return load_model(self.folder, dtype=torch.float32, trust_remote_code=self.trust_remote_code)

    @property
    def head_is_pruned(self) -> bool:
        """Whether the output head is pruned, too."""
        return _head_is_pruned(self.folder)


def open_checkpoint(checkpoint: str | Path, *, adapters: bool = False, trust_remote_code: bool = False) -> Checkpoint:
    """Find a model folder or hub id and check, before anything large is read, that it can be exported.

    Args:
        adapters: whether low-rank factors beside the weights may stay unmerged.

    Raises:
        UserError: not a causal LM, quantised or packed weights, an adapter that is not merged, or no tokenizer.
    """
    # Heavy, and not needed to describe an exported folder.
    from sparsedeploy.models import low_rank
    from sparsedeploy.models.fingerprint import model_sha256
    from sparsedeploy.models.loading import load_config, resolve_model
    from sparsedeploy.models.tensor_files import TensorFiles
    from sparsedeploy.models.tokenizer import load_tokenizer

    name = expand(checkpoint).resolve().name
    folder = resolve_model(checkpoint)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{folder} is quantised or packed", "Export the model before quantisation or packing.")
    if not adapters:
        low_rank.refuse_unmerged(folder)
    TensorFiles(folder)  # refuses what is not the model or is corrupt, before every byte is hashed
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    return Checkpoint(folder, config, tokenizer, Source(name, model_sha256(folder)), trust_remote_code)


def describe_folder(folder: Path, *, verify: bool = False) -> Artifact:
    """The description of an exported folder, or one made from a plain checkpoint, whose zeros are counted.

    Args:
        verify: compare the hashes of an exported folder's files.

    Raises:
        UserError: neither, or what :func:`load_artifact` refuses.
    """
    folder = Path(folder)
    if (folder / ARTIFACT_FILE).is_file() or not (folder / "config.json").is_file():
        return load_artifact(folder, verify=verify)
    return _describe_checkpoint(folder)


def _head_is_pruned(folder: Path) -> bool:
    """What the manifest of a pruned checkpoint says; False for any other folder."""
    from sparsedeploy.checkpoint.manifest import MANIFEST, load_manifest

    return (folder / MANIFEST).is_file() and load_manifest(folder).plan.has_head


def _describe_checkpoint(folder: Path) -> Artifact:
    # Heavy, and not needed for an exported folder.
    from sparsedeploy.models.fingerprint import model_sha256
    from sparsedeploy.models.loading import build_empty, load_config
    from sparsedeploy.models.stored_names import read_linear, stored_slices
    from sparsedeploy.models.structure import find_decoder_stack
    from sparsedeploy.models.tensor_files import TensorFiles

    config = load_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{folder} is packed and its {ARTIFACT_FILE} is missing", "Copy the whole folder again.")
    model = build_empty(folder, config, trust_remote_code=False)
    files = TensorFiles(folder)
    weights = zeros = 0
    dtype = "float32"
    head = _head_is_pruned(folder)
    linears = find_decoder_stack(model, head).all_linears()
    for module, slices in stored_slices(model, files, head).items():
        weight = read_linear(files, slices, linears[module].in_features)
        weights += weight.numel()
        zeros += weight.numel() - int(weight.count_nonzero())
        dtype = str(weight.dtype).removeprefix("torch.")
    return Artifact(
        target=CHECKPOINT,
        source=Source(name=folder.resolve().name, sha256=model_sha256(folder)),
        model_type=config.model_type,
        shapes=config_shapes(config),
        dtype=dtype,
        opset=None,
        files={},
        sparsity=Sparsity(weights, zeros),
        engine=Engine(name="transformers", version=str(getattr(config, "transformers_version", None) or "unknown")),
        bytes_per_token=folder_bytes(folder, config),
    )
