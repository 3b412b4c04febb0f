"""``sparsedeploy export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsedeploy.cli.common import (
    JsonOption,
    ModelArgument,
    OutputOption,
    OverwriteOption,
    TrustOption,
    console,
    print_json,
)
from sparsedeploy.options import one_of
from sparsedeploy.registry import TARGETS

if TYPE_CHECKING:
    from sparsedeploy.artifacts.description import Artifact, Quantization


def export_command(
    model: ModelArgument,
    target: Annotated[str, typer.Option("--target", "-t", help=f"What to export for: {one_of(TARGETS.names())}.")],
    output: OutputOption,
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize",
            help="Quantise the pruned weights too. vllm: fp8-dynamic, w8a8, w4a16; llamacpp: q8_0, q4_0, f16.",
        ),
    ] = None,
    target_option: Annotated[
        list[str] | None, typer.Option("--target-option", help="NAME=VALUE for the target. Repeatable.")
    ] = None,
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Export a model for a runtime and verify its outputs against the original."""
    from sparsedeploy.options import parse_pairs
    from sparsedeploy.targets.registry import export_checkpoint

    artifact = export_checkpoint(
        model,
        target,
        output,
        parse_pairs(target_option or []),
        quantize=quantize,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
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
        console.print("not checked against the model: install onnxruntime and export again to have it checked")


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
