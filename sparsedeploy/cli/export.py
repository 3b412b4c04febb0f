"""``sparsedeploy export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparsedeploy.cli.common import JsonOption, ModelArgument, OutputOption, console, print_json
from sparsedeploy.cli.flags import Given, Section, takes
from sparsedeploy.targets.options import ExportOptions
from sparsedeploy.workflows.options import RunOptions

if TYPE_CHECKING:
    from sparsedeploy.artifacts.description import Artifact, Quantization


@takes(
    Section("export", ExportOptions),
    Section("run", RunOptions, without=("device", "dtype", "resume")),
)
def export_command(
    model: ModelArgument,
    output: OutputOption,
    given: Given,
    as_json: JsonOption = False,
) -> None:
    """Export a model for a runtime and verify its outputs against the original."""
    from sparsedeploy.targets.registry import export_checkpoint

    asked, run = given.build("export", ExportOptions), given.build("run", RunOptions)
    artifact = export_checkpoint(
        model,
        asked.target,
        output,
        asked.options,
        quantize=asked.quantize,
        trust_remote_code=run.trust_remote_code,
        overwrite=run.overwrite,
    )
    if as_json:
        print_json({"output": str(output), **artifact.to_json()})
    else:
        _print(output, artifact)


def _print(output: Path, artifact: Artifact) -> None:
    shapes, sparsity = artifact.shapes, artifact.sparsity
    console.print(
        f"{output}: {artifact.model_type} for {artifact.engine.name} {artifact.engine.version}, "
        f"{shapes.layers} layers, {artifact.dtype}"
    )
    console.print(f"{sparsity.fraction:.2%} of {sparsity.weights:,} prunable weights are zero")
    if artifact.quantization is not None:
        _print_quantization(artifact.quantization)
    if artifact.check is not None:
        console.print(
            f"checked against the model on {artifact.check.tokens} tokens: logits differ by at most "
            f"{artifact.check.largest_difference:.1e} (the largest is {artifact.check.largest_logit:.3g})"
        )
    elif artifact.opset is not None:
        console.print("not checked against the model: install onnxruntime and export again to check it")


def _print_quantization(quantization: Quantization) -> None:
    group = f", {quantization.group_size} weights to a scale" if quantization.group_size else ""
    console.print(
        f"{quantization.scheme} ({quantization.algorithm}{group}): {quantization.pruned - quantization.revived:,} of "
        f"{quantization.pruned:,} pruned weights are still zero"
    )
    if quantization.perplexity_after is not None:
        console.print(
            f"perplexity on {quantization.text}: {quantization.perplexity_before:.2f} before, "
            f"{quantization.perplexity_after:.2f} after"
        )
