"""``sparsedeploy sweep``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsedeploy.cli.common import JsonOption, console, print_json
from sparsedeploy.cli.flags import Given, Section, takes
from sparsedeploy.errors import UserError
from sparsedeploy.models.options import LoadOptions

_ON = ("local", "ray")


@takes(Section("load", LoadOptions))
def sweep_command(
    sweep: Annotated[Path, typer.Argument(help="YAML file: a model, and a grid of what to try.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the cells and the report; finished cells are kept.")
    ],
    given: Given,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Cells that run at once.")] = 1,
    on: Annotated[
        str,
        typer.Option("--on", help="local: processes of this machine; ray: a cluster that shares the output folder."),
    ] = "local",
    pick: Annotated[
        str | None,
        typer.Option("--pick", help="Name the cell to ship: 'smallest within 5 % of dense' or 'best below 300 MB'."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prune and recover over a grid, and show the best model of each size.

    Each cell is a folder with its checkpoint and figures. A process that dies loses its cell only; the same command
    goes on with what is missing.
    """
    from sparsedeploy.reporting.sweep import summary_table
    from sparsedeploy.workflows.sweep import REPORT, check_wish, picked, run_sweep
    from sparsedeploy.workflows.sweep_file import load_sweep

    if on not in _ON:
        raise UserError(f"unknown place '{on}'", f"Use --on {' or '.join(_ON)}.")
    if pick is not None:
        check_wish(pick)
    report = run_sweep(
        load_sweep(sweep),
        output,
        jobs=jobs,
        load=given.build("load", LoadOptions),
        on=on,
        command=shlex.join(["sparsedeploy", *sys.argv[1:]]),
    )
    chosen = picked(report["cells"], pick) if pick is not None else None
    if as_json:
        print_json({**report, "pick": None if chosen is None else chosen["name"]})
        return
    console.print(summary_table(report["cells"]))
    console.print(f"report: {output / REPORT}.html, .md and .json", soft_wrap=True)
    if chosen is not None:
        console.print(f"{pick}: {output / chosen['name'] / 'checkpoint'}", soft_wrap=True)
