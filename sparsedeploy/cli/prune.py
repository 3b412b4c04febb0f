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
from sparsedeploy.cli.plan_options import (
    AllocationOption,
    AllocationOptionsOption,
    BatchSizeOption,
    DataFieldOption,
    DataOption,
    DtypeOption,
    LengthOption,
    MethodOption,
    MethodOptionsOption,
    PatternOption,
    PatternOptionsOption,
    SamplesOption,
    SeedOption,
    SparsityOption,
)


def prune_command(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    output: OutputOption,
    sparsity: SparsityOption = None,
    method: MethodOption = "wanda",
    allocation: AllocationOption = "uniform",
    pattern: PatternOption = "unstructured",
    plan: Annotated[Path | None, typer.Option("--plan", help="Use this plan file; no allocation is run.")] = None,
    data: DataOption = "c4",
    data_field: DataFieldOption = "text",
    samples: SamplesOption = 128,
    calibration_length: LengthOption = None,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = 1,
    method_option: MethodOptionsOption = None,
    allocation_option: AllocationOptionsOption = None,
    pattern_option: PatternOptionsOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of this command.")] = False,
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
            pattern_options=parse_options(pattern_option or []),
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
