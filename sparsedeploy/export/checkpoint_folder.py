"""Plain Hugging Face folders beside exported ones: some runtimes load a checkpoint as it is."""

from __future__ import annotations

from pathlib import Path

from sparsedeploy.export.artifact import (
    ARTIFACT_FILE,
    Artifact,
    Engine,
    Source,
    Sparsity,
    config_shapes,
    load_artifact,
)

# The target of a folder that was not exported.
CHECKPOINT = "checkpoint"


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


def _describe_checkpoint(folder: Path) -> Artifact:
    # Heavy, and not needed for an exported folder.
    from accelerate import init_empty_weights
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    from sparsedeploy.models.fingerprint import model_sha256
    from sparsedeploy.models.loading import load_config
    from sparsedeploy.models.structure import find_decoder_stack
    from sparsedeploy.models.tensor_files import TensorFiles

    config = load_config(folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    files = TensorFiles(folder)
    weights = zeros = 0
    dtype = "float32"
    for module in find_decoder_stack(model).all_linears():
        stored = files.locate(f"{module}.weight")
        with safe_open(stored.shard, framework="pt") as file:
            weight = file.get_tensor(stored.name)
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
    )
