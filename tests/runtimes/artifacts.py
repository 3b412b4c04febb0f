"""Artifact folders that describe a model without holding one, and folders that are described again after a change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from sparsedeploy.artifacts.description import (
    ARTIFACT_FILE,
    Artifact,
    Engine,
    Shapes,
    Source,
    Sparsity,
    hash_files,
    write_artifact,
)
from sparsedeploy.reading import HASH, hashed


def describe(
    *, target: str = "deepsparse", weights: int = 1000, zeros: int = 0, vocab: int = 50, hidden: int = 10
) -> Artifact:
    """The description of an artifact of these sizes."""
    return Artifact(
        target=target,
        source=Source("model", "0" * 64),
        model_type="llama",
        shapes=Shapes(layers=2, kv_heads=2, head_dim=8, hidden=hidden, vocab=vocab, max_positions=64),
        dtype="float32",
        opset=14,
        files={},
        sparsity=Sparsity(weights, zeros),
        engine=Engine("deepsparse", "1.8.0"),
        bytes_per_token=4 * (weights - zeros) + 4 * vocab * hidden,
    )


def write_folder(folder: Path, artifact: Artifact) -> Path:
    """A folder with that description and a graph file that no engine ever reads."""
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    write_artifact(folder, dataclasses.replace(artifact, files=hash_files(folder)))
    return folder


def refresh(folder: Path, **changes: object) -> Path:
    """Describe a folder again after its files were changed, as if it had been exported so.

    Args:
        changes: other values of its description.
    """
    path = folder / ARTIFACT_FILE
    values = {**json.loads(path.read_text()), "files": hash_files(folder), **changes}
    del values[HASH]
    path.write_text(json.dumps(hashed(values)))
    return folder
