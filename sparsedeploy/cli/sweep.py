"""``sparsedeploy sweep``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsedeploy.cli.common import JsonOption, WorkFolderOption, console, print_json
from sparsedeploy.cli.flags import Given, Section, takes
from sparsedeploy.models.options import LoadOptions
from sparsedeploy.workflows.options import SweepOptions


@takes(Section("sweep", SweepOptions), Section("load", LoadOptions))
def sweep_command(
    sweep: Annotated[Path, typer.Argument(help="YAML file: a model, and a grid of what to try.")],
    output: WorkFolderOption,
    given: Given,
    as_json: JsonOption = False,
) -> None:
    """Prune and recover over a grid, and show the best model of each size.

    Each cell is a folder with its checkpoint and figures. A process that dies loses only its cell; run the same
    command again to fill in what is missing.
    """
    from sparsedeploy.reporting.sweep import summary_table
    from sparsedeploy.workflows.sweep import REPORT, check_wish, picked, run_sweep
    from sparsedeploy.workflows.sweep_file import load_sweep

    asked = given.build("sweep", SweepOptions)
    if asked.pick is not None:
        check_wish(asked.pick)
    report = run_sweep(
        load_sweep(sweep),
        output,
        jobs=asked.jobs,
        load=given.build("load", LoadOptions),
        on=asked.on,
        command=shlex.join(["sparsedeploy", *sys.argv[1:]]),
    )
    chosen = picked(report["cells"], asked.pick) if asked.pick is not None else None
    if as_json:
        print_json({**report, "pick": None if chosen is None else chosen["name"]})
        return
    console.print(summary_table(report["cells"]))
    console.print(f"report: {output / REPORT}.html, .md and .json", soft_wrap=True)
    if chosen is not None:
        console.print(f"{asked.pick}: {output / chosen['name'] / 'checkpoint'}", soft_wrap=True)
