"""``sparsedeploy bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsedeploy.cli.common import DtypeOption, JsonOption, RuntimePythonOption, console, named_dtype, print_json
from sparsedeploy.cli.flags import refuse_typed
from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json, write_text
from sparsedeploy.reporting.benchmark_csv import benchmark_csv
from sparsedeploy.reporting.benchmark_page import benchmark_page
from sparsedeploy.reporting.benchmark_table import benchmark_heading, benchmark_legend, benchmark_tables
from sparsedeploy.reporting.comparison_table import comparison_table
from sparsedeploy.speed.benchmark import BenchmarkResult, benchmark
from sparsedeploy.speed.comparison import compare_results, load_result, parse_threshold


def bench_command(
    context: typer.Context,
    artifacts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders to compare with the baseline: exported, or plain checkpoints. RUNTIME=FOLDER too."
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", "-b", help="Folder of the dense model, or RUNTIME=FOLDER.")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option("--runtime", help="Engine of the folders that name none [default: each its own].")
    ] = None,
    python: RuntimePythonOption = None,
    cores: Annotated[
        str | None, typer.Option("--cores", "-c", help="Cores to use, such as 1,2 [default: all].")
    ] = None,
    prompt_length: Annotated[
        str, typer.Option("--prompt-length", help="Tokens of the prompt, such as 128,512.")
    ] = "64",
    batch: Annotated[str, typer.Option("--batch", help="Sequences at once, such as 1,4, where a runtime can.")] = "1",
    decode_tokens: Annotated[int, typer.Option("--decode-tokens", help="Tokens to decode after the prompt.")] = 64,
    rounds: Annotated[int, typer.Option("--rounds", "-r", help="Times that each folder is measured.")] = 10,
    warmup: Annotated[int, typer.Option("--warmup", help="Rounds before that, not counted.")] = 2,
    chunk: Annotated[
        int | None,
        typer.Option("--chunk", help="Prompt tokens run at once [default: the whole prompt, at most 64]."),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also show the time of each layer, where the engine tells.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random prompt.")] = 0,
    dtype: DtypeOption = "auto",
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that loading or one run may take.")] = 600.0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the result with every sample, as JSON.")
    ] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="File for the rows as CSV.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="File for a page with tables and plots.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", help="Measure nothing; compare two results, OLD NEW."),
    ] = None,
    threshold: Annotated[
        str, typer.Option("--threshold", help="With --compare: growth that counts as a regression.")
    ] = "5%",
    json_output: JsonOption = False,
) -> None:
    """Measure prefill, decode and both together against a dense baseline, interleaved in one run.

    Exit code 1: the baseline failed somewhere or no artifact was measured; with --compare, something became worse.
    A single artifact that fails is a row with its reason.
    """
    if compare is not None:
        if artifacts or baseline:
            raise UserError("--compare measures nothing", "Leave out the folders, or --compare.")
        measured = {param.name for param in context.command.params if param.name} - {
            "compare",
            "threshold",
            "json_output",
        }
        refuse_typed(context, measured, "--compare measures nothing")
        _compare(compare, threshold, json_output)
        return
    refuse_typed(context, ("threshold",), "there is no --compare")
    if baseline is None:
        raise UserError("there is no baseline", "Name the dense model's folder: --baseline FOLDER.")
    result = benchmark(
        artifacts or [],
        baseline,
        runtime=runtime,
        python=python,
        cores=None if cores is None else _numbers(cores, "--cores"),
        prompt_lengths=_numbers(prompt_length, "--prompt-length"),
        batches=_numbers(batch, "--batch"),
        decode_tokens=decode_tokens,
        rounds=rounds,
        warmup_rounds=warmup,
        chunk=chunk,
        seed=seed,
        profile=profile,
        dtype=named_dtype(dtype),
        timeout=timeout,
    )
    values = result.to_json()
    if output is not None:
        write_json(output, values)
    if csv is not None:
        write_text(csv, benchmark_csv(values))
    if html is not None:
        write_text(html, benchmark_page(values))
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


def _numbers(text: str, option: str) -> list[int]:
    """``128,512`` as numbers.

    Raises:
        UserError: anything else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} is '{text}'", "Give numbers with commas between them, such as 1,2.") from None
