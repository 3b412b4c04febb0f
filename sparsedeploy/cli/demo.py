"""``sparsedeploy demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsedeploy.cli.common import JsonOption, console, print_json
from sparsedeploy.cli.plan_options import MethodOption


def demo_command(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for checkpoints, artifacts and report.")
    ] = Path("demo-output"),
    sparsity: Annotated[
        list[float] | None, typer.Option("--sparsity", "-s", help="Repeat for several [default: 0.5, 0.7, 0.9].")
    ] = None,
    method: MethodOption = "sparsegpt",
    allocation: Annotated[str, typer.Option("--allocation", "-a", help="How sparsity is spread.")] = "uniform",
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Also measure tasks of lm-evaluation-harness, such as python_lines."),
    ] = None,
    preset: Annotated[str, typer.Option("--preset", help="Reference model: default (minutes) or tiny.")] = "default",
    rounds: Annotated[int, typer.Option("--rounds", "-r", help="Benchmark rounds.")] = 10,
    profile: Annotated[bool, typer.Option("--profile", help="Also measure the time of each layer.")] = False,
    cores: Annotated[int | None, typer.Option("--cores", "-c", help="Cores to measure on [default: all].")] = None,
    python: Annotated[
        str | None, typer.Option("--python", help="Python for DeepSparse's environment, 3.8 to 3.11.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Everything in one command, with nothing to download: train a small model on Python's own library, prune it,
    export it, run it in DeepSparse, and report what became faster and what it cost."""
    import sys

    from sparsedeploy.reporting.report import heading, summary_table
    from sparsedeploy.workflows.demo import DemoOptions, demo

    asked = DemoOptions(
        preset=preset,
        sparsities=tuple(sparsity) if sparsity else DemoOptions.sparsities,
        method=method,
        allocation=allocation,
        tasks=tuple(name.strip() for name in (tasks or "").split(",") if name.strip()),
        rounds=rounds,
        profile=profile,
        cores=cores,
        python=python,
    )
    report = demo(output, asked, command=" ".join(["sparsedeploy", *sys.argv[1:]]))
    if as_json:
        print_json(report)
        return
    console.print(summary_table(report))
    console.print(heading(report), markup=False)
    for note in report["benchmark"]["notes"]:
        console.print(f"note: {note}", markup=False)
    console.print(f"report: {output / 'report.html'} and {output / 'report.json'}", soft_wrap=True)
