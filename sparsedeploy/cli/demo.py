"""``sparsedeploy demo``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsedeploy.cli.common import JsonOption, console, print_json
from sparsedeploy.cli.flags import Given, Section, takes
from sparsedeploy.workflows.options import DemoOptions


@takes(Section("demo", DemoOptions))
def demo_command(
    given: Given,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for checkpoints, artifacts and report.")
    ] = Path("demo-output"),
    as_json: JsonOption = False,
) -> None:
    """Everything in one command, with nothing to download.

    Trains a small model on Python's own library, prunes it, exports it, runs it in DeepSparse, and reports what became
    faster and what it cost.
    """
    from sparsedeploy.reporting.report import heading, summary_table
    from sparsedeploy.workflows.demo import demo

    report = demo(output, DemoOptions(**given.take("demo")), command=shlex.join(["sparsedeploy", *sys.argv[1:]]))
    if as_json:
        print_json(report)
        return
    console.print(summary_table(report))
    console.print(heading(report), markup=False)
    for note in report["benchmark"]["notes"]:
        console.print(f"note: {note}", markup=False)
    console.print(f"report: {output / 'report.html'} and {output / 'report.json'}", soft_wrap=True)
