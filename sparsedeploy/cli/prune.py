"""``sparsedeploy prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsedeploy.cli.common import (
    DeviceOption,
    JsonOption,
    OutputOption,
    OverwriteOption,
    TrustOption,
    console,
    parse_dtype,
    print_json,
)


def prune_command(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    output: OutputOption,
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", "-s", help="Fraction of decoder-linear weights to remove: 0.7.")
    ] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="magnitude, wanda or sparsegpt.")] = "wanda",
    allocation: Annotated[
        str, typer.Option("--allocation", "-a", help="How sparsity is spread over layers: uniform, owl, ...")
    ] = "uniform",
    pattern: Annotated[
        str, typer.Option("--pattern", "-p", help="unstructured, or N:M with N of every M kept: 2:4, 4:8, 2:8.")
    ] = "unstructured",
    plan: Annotated[Path | None, typer.Option("--plan", help="Use this plan file; no allocation is run.")] = None,
    data: Annotated[
        str,
        typer.Option(
            "--data", "-d", help="Calibration text: file, folder, .jsonl, stdlib, c4, datasets:NAME[:CONFIG]."
        ),
    ] = "c4",
    data_field: Annotated[str, typer.Option("--data-field", help="Text field of JSONL rows and data sets.")] = "text",
    samples: Annotated[int, typer.Option("--samples", "-n", help="Calibration sequences.")] = 128,
    calibration_length: Annotated[
        int | None, typer.Option("--calibration-length", help="Tokens per sequence [default: min(2048, positions)].")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the calibration sampler.")] = 0,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Sequences per layer call; no effect on results.")
    ] = 1,
    method_option: Annotated[
        list[str] | None, typer.Option("--method-option", help="NAME=VALUE for the method, such as block=64.")
    ] = None,
    allocation_option: Annotated[
        list[str] | None, typer.Option("--allocation-option", help="NAME=VALUE for the allocation: strength=0.1.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Compute in auto (the checkpoint's own), float32, bfloat16 or float16.")
    ] = "auto",
    device: DeviceOption = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of this command.")
    ] = False,
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a model sparse: calibrate, allocate, prune, and write a Hugging Face folder with its plan and masks."""
    from sparsedeploy.pipeline import CalibrationOptions, PruneOptions, prune
    from sparsedeploy.plan import SparsityPlan
    from sparsedeploy.registry import parse_options

    manifest = prune(
        model,
        output,
        PruneOptions(
            sparsity=sparsity,
            pattern=pattern,
            method=method,
            method_options=parse_options(method_option or []),
            allocation=allocation,
            allocation_options=parse_options(allocation_option or []),
            plan=SparsityPlan.load(plan) if plan else None,
            calibration=CalibrationOptions(
                data=data,
                field=data_field,
                sequences=samples,
                length=calibration_length,
                seed=seed,
                batch_size=batch_size,
            ),
        ),
        device=device,
        dtype=parse_dtype(dtype),
        resume=resume,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json({"output": str(output), **_summary(manifest)})
        return
    summary = _summary(manifest)
    console.print(
        f"{output}: {summary['achieved']:.2%} of {summary['modules']} modules' weights are zero "
        f"({summary['method']}, {summary['allocation']}, {summary['pattern']})"
    )
    console.print(f"next: sparsedeploy export {output} --target deepsparse -o ARTIFACT", soft_wrap=True)


def _summary(manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        "sparsity": manifest["plan"]["sparsity"],
        "achieved": manifest["achieved"],
        "modules": len(manifest["modules"]),
        "method": manifest["method"],
        "allocation": manifest["plan"]["allocation"],
        "pattern": manifest["plan"]["pattern"],
        "calibration": manifest["calibration"],
        "source": manifest["source"],
    }
