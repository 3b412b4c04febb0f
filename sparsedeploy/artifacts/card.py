"""The model card of an exported folder: where it came from and what runs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparsedeploy.artifacts.description import Artifact
from sparsedeploy.checkpoint.card import (
    CARD,
    Base,
    base_link,
    code,
    front_values,
    licence_section,
    read_base,
    results_section,
    signed,
    table,
)
from sparsedeploy.checkpoint.evaluations import load_evaluations
from sparsedeploy.checkpoint.manifest import MANIFEST, load_manifest
from sparsedeploy.folders import write_text

_TAGS = {"onnxruntime": ["onnx"], "deepsparse": ["onnx", "deepsparse"], "llamacpp": ["gguf", "llama.cpp"]}
_RUN = {
    "deepsparse": (
        "sparsedeploy runtime install deepsparse",
        'sparsedeploy generate FOLDER "Once upon a time"',
        "sparsedeploy runtime install deepsparse --with server",
        "sparsedeploy serve FOLDER --port 8000",
    ),
    "onnxruntime": (
        "sparsedeploy runtime install onnxruntime",
        'sparsedeploy generate FOLDER "Once upon a time"',
    ),
    "llamacpp": (
        "sparsedeploy runtime install llamacpp",
        'sparsedeploy generate FOLDER "Once upon a time"',
        "sparsedeploy serve FOLDER --port 8000",
        "# Any other llama.cpp runs the file too, without the gain of its zeros:",
        "llama-server --model FOLDER/model.gguf",
    ),
    "vllm": (
        "sparsedeploy runtime install vllm",
        'sparsedeploy generate FOLDER "Once upon a time"',
        "sparsedeploy serve FOLDER --port 8000",
    ),
}


def write_artifact_card(folder: Path, artifact: Artifact, checkpoint: Path, name: str) -> None:
    """Write the card of a folder that was just exported; a target's own README.md is left alone.

    Args:
        checkpoint: the folder that was exported.
        name: as the user called it.
    """
    if artifact.target not in _RUN or (folder / CARD).exists():
        return
    base, pruning, dense = read_base(checkpoint, name), "", artifact.source.sha256
    if (checkpoint / MANIFEST).is_file():
        manifest = load_manifest(checkpoint)
        base, pruning = read_base(checkpoint, manifest.source.name), f"{manifest.method}, {manifest.plan.allocation}"
        dense = manifest.source.sha256 or ""
    evaluations = load_evaluations(checkpoint, artifact.source.sha256, dense)
    write_text(folder / CARD, artifact_card(base, artifact, pruning, evaluations))


def artifact_card(base: Base, artifact: Artifact, pruning: str, evaluations: Iterable[Mapping[str, Any]] = ()) -> str:
    """The card of an exported folder.

    Args:
        pruning: method and allocation, where the checkpoint says.
        evaluations: of the checkpoint and its base, in PyTorch.
    """
    short, sparsity = base.name.rpartition("/")[2], artifact.sparsity
    evaluations = list(evaluations)
    facts = {
        "base model": base_link(base),
        "checkpoint": f"{artifact.source.name} (sha256 {artifact.source.sha256[:16]})",
        "sparsity": f"{sparsity.fraction:.2%} of {sparsity.weights:,} weights" + (f" ({pruning})" if pruning else ""),
        "type": artifact.dtype,
        "made for": f"{artifact.engine.name} {artifact.engine.version}",
        "sparsedeploy": artifact.sparsedeploy,
    }
    if (quantized := artifact.quantization) is not None:
        group = f", {quantized.group_size} weights to a scale" if quantized.group_size else ""
        facts["quantised"] = f"{quantized.scheme} ({quantized.algorithm}{group})"
    if artifact.check is not None:
        facts["checked"] = (
            f"logits within {artifact.check.largest_difference:.1e} of the checkpoint's on {artifact.check.tokens} "
            f"tokens (the largest is {artifact.check.largest_logit:.3g})"
        )
    front = front_values(base, ["sparse", "sparsedeploy", *_TAGS.get(artifact.target, [artifact.target])], short, [])
    if artifact.target != "vllm":
        front["library_name"] = {"llamacpp": "gguf"}.get(artifact.target, "onnx")
    body = [
        f"# {short}, {sparsity.fraction:.0%} sparse, for {artifact.engine.name}",
        f"Exported by sparsedeploy from {base_link(base)}; `artifact.json` describes the folder.",
        table(("", ""), facts.items()),
        results_section(evaluations, "checkpoint"),
        "## Run it",
        "FOLDER is this folder.",
        code("bash", *_RUN[artifact.target]),
        licence_section(base),
    ]
    return signed(front, body)
