"""``sparsedeploy bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsedeploy.cli.common import JsonOption, ResultOption, console, print_json
from sparsedeploy.cli.flags import Given, Section, takes
from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json, write_text
from sparsedeploy.reporting.benchmark_csv import benchmark_csv
from sparsedeploy.reporting.benchmark_page import benchmark_page
from sparsedeploy.reporting.benchmark_table import benchmark_heading, benchmark_legend, benchmark_tables
from sparsedeploy.reporting.comparison_table import comparison_table
from sparsedeploy.speed.benchmark import BenchmarkResult, benchmark
from sparsedeploy.speed.comparison import compare_results, load_result, parse_threshold
from sparsedeploy.speed.options import BenchmarkOptions, CompareOptions, ResultOptions


@takes(Section("bench", BenchmarkOptions), Section("result", ResultOptions), Section("compare", CompareOptions))
def bench_command(
    given: Given,
    artifacts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders to compare with the baseline: exports or plain checkpoints; RUNTIME=FOLDER names the engine."
        ),
    ] = None,
    output: ResultOption = None,
    json_output: JsonOption = False,
) -> None:
    """Measure prefill, decode and both together against a dense baseline, interleaved in one run.

    Exit code 1: the baseline failed somewhere or no artifact was measured; with --compare, something became worse.
    A single artifact that fails is a row with its reason.
    """
    compared = given.build("compare", CompareOptions)
    if compared.compare is not None:
        if artifacts or output is not None:
            raise UserError("--compare measures nothing", "Leave out the folders and --output, or --compare.")
        given.refuse_unread(dict.fromkeys(("bench", "result"), "--compare measures nothing"))
        _compare(compared.compare, compared.threshold, json_output)
        return
    result = benchmark(artifacts or [], given.build("bench", BenchmarkOptions))
    values, files = result.to_json(), given.build("result", ResultOptions)
    if output is not None:
        write_json(output, values)
    if files.csv is not None:
        write_text(files.csv, benchmark_csv(values))
    if files.html is not None:
        write_text(files.html, benchmark_page(values))
    if json_output:
        print_json(values)
    else:
        _print(result)
    if result.failed:
        raise typer.Exit(1)


def _print(result: BenchmarkResult) -> None:
    values = result.to_json()
    console.print(benchmark_heading(values), markup=False)
    for table in benchmark_tables(values):
        console.print(table)
    for line in benchmark_legend(values):
        console.print(line, markup=False)


def _compare(paths: tuple[Path, Path], threshold: str, json_output: bool) -> None:
    limit = parse_threshold(threshold)
    comparison = compare_results(load_result(paths[0]), load_result(paths[1]), limit)
    if json_output:
        print_json(comparison.to_json())
    else:
        console.print(comparison_table(comparison))
        for note in comparison.notes:
            console.print(f"note: {note}", markup=False)
        count = len(comparison.regressions)
        found = f"{count} regression{'s' if count > 1 else ''}" if count else "no regression"
        console.print(f"{found} beyond {limit:.1%}", markup=False)
    if comparison.regressions:
        raise typer.Exit(1)
