"""``sparsedeploy allocate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsedeploy.cli.common import (
    DataFieldOption,
    DenseModelArgument,
    DeviceOption,
    DtypeOption,
    JsonOption,
    TrustOption,
    console,
    parse_dtype,
    print_json,
)
from sparsedeploy.cli.plan_options import (
    AllocationOption,
    AllocationOptionsOption,
    BatchSizeOption,
    DataOption,
    LengthOption,
    MethodOptionsOption,
    PatternOption,
    PatternOptionsOption,
    SamplesOption,
    SeedOption,
    SparsityOption,
)
from sparsedeploy.errors import UserError


def allocate_command(
    model: DenseModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Plan file to write, such as plan.json.")],
    sparsity: SparsityOption = None,
    allocation: AllocationOption = "uniform",
    pattern: PatternOption = "unstructured",
    data: DataOption = "c4",
    data_field: DataFieldOption = "text",
    samples: SamplesOption = 128,
    calibration_length: LengthOption = None,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = None,
    allocation_option: AllocationOptionsOption = None,
    pattern_option: PatternOptionsOption = None,
    method: Annotated[
        str, typer.Option("--method", "-m", help="The method that a search (atp with search=true) prunes with.")
    ] = "wanda",
    method_option: MethodOptionsOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the plan file if it exists.")] = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Decide how much each layer loses and write it as a plan, without pruning; `prune --plan FILE` follows it."""
    from sparsedeploy.calibration.text import CalibrationOptions
    from sparsedeploy.options import parse_pairs
    from sparsedeploy.reporting.plan_plot import plan_table
    from sparsedeploy.workflows.options import PruneOptions
    from sparsedeploy.workflows.plan import plan_model

    if output.exists() and not overwrite:
        raise UserError(f"output {output} exists", "Choose another, or pass --overwrite to replace it.")
    plan = plan_model(
        model,
        PruneOptions(
            sparsity=sparsity,
            pattern=pattern,
            pattern_options=parse_pairs(pattern_option or []),
            method=method,
            method_options=parse_pairs(method_option or []),
            allocation=allocation,
            allocation_options=parse_pairs(allocation_option or []),
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
        trust_remote_code=trust_remote_code,
    )
    plan.save(output)
    if as_json:
        print_json({"output": str(output), **plan.to_dict()})
        return
    console.print(plan_table({allocation: plan}, console.width))
    console.print(
        f"{output}: {plan.achieved:.5f} global sparsity, asked {plan.sparsity:.5f} ({allocation}, {plan.pattern})",
        soft_wrap=True,
    )
    console.print(f"next: sparsedeploy prune {model} -o SPARSE --plan {output}", soft_wrap=True)
