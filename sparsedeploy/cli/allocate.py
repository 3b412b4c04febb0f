"""``sparsedeploy allocate``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sparsedeploy.cli.common import DenseModelArgument, JsonOption, console, print_json
from sparsedeploy.cli.flags import Given, Section, takes
from sparsedeploy.errors import UserError
from sparsedeploy.paths import check_apart
from sparsedeploy.workflows.options import CalibrationOptions, PruneOptions, RunOptions

_SEARCH = ("method", "method_options", "reconstruct")


@takes(
    Section("prune", PruneOptions, without=("quantize", "quantize_group")),
    Section("calibration", CalibrationOptions, "Calibration text"),
    Section("run", RunOptions, without=("resume",)),
)
def allocate_command(
    model: DenseModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Plan file to write, such as plan.json.")],
    given: Given,
    as_json: JsonOption = False,
) -> None:
    """Decide how much each layer loses and write it as a plan, without pruning; `prune --plan FILE` follows it.

    `--method` is the method that a search (such as atp with search=true) prunes with.
    """
    from sparsedeploy.reporting.plan_plot import plan_table
    from sparsedeploy.workflows.plan import measures_text, plan_model, resolve_allocation

    run = given.build("run", RunOptions)
    if output.exists() and not run.overwrite:
        raise UserError(f"output {output} exists", "Choose another, or pass --overwrite to replace it.")
    options = PruneOptions(**given.take("prune", without=_SEARCH))
    choice = resolve_allocation(options)
    if choice.searches:
        options = PruneOptions(**given.take("prune"))
    if choice.searches or measures_text(choice, options.method, prunes=False):
        options = replace(options, calibration=CalibrationOptions(**given.take("calibration")))
        check_apart(output, [options.calibration.data])
    given.refuse_unread(
        {"prune": f"{choice.name} does not prune", "calibration": f"{choice.name} reads no calibration text"}
    )
    plan = plan_model(model, options, run)
    plan.save(output)
    if as_json:
        print_json({"output": str(output), **plan.to_dict()})
        return
    console.print(plan_table({plan.allocation: plan}, console.width))
    console.print(
        f"{output}: {plan.achieved:.5f} global sparsity, asked {plan.sparsity:.5f} ({plan.allocation}, {plan.pattern})",
        soft_wrap=True,
    )
    console.print(f"next: sparsedeploy prune {model} -o SPARSE --plan {output}", soft_wrap=True)
