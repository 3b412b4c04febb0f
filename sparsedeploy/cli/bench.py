"""``sparsedeploy bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsedeploy.cli.common import JsonOption, console, print_json
from sparsedeploy.evaluation.benchmark import benchmark
from sparsedeploy.folders import write_json
from sparsedeploy.reporting.benchmark_table import benchmark_heading, benchmark_legend, benchmark_tables


def bench_command(
    artifacts: Annotated[list[Path], typer.Argument(help="Exported folders to compare with the baseline.")],
    baseline: Annotated[Path, typer.Option("--baseline", "-b", help="Exported folder of the dense model.")],
    runtime: Annotated[
        str | None, typer.Option("--runtime", help="Engine to measure on [default: the artifacts' own].")
    ] = None,
    python: Annotated[
        str | None, typer.Option("--python", help="Interpreter of an environment of your own that has the runtime.")
    ] = None,
    cores: Annotated[int | None, typer.Option("--cores", "-c", help="Cores to use [default: all].")] = None,
    prompt_length: Annotated[int, typer.Option("--prompt-length", help="Tokens of the prompt.")] = 64,
    decode_tokens: Annotated[int, typer.Option("--decode-tokens", help="Tokens to decode after it.")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", "-r", help="Times that each artifact is measured.")] = 10,
    warmup: Annotated[int, typer.Option("--warmup", help="Rounds before that, not counted.")] = 2,
    chunk: Annotated[
        int | None,
        typer.Option("--chunk", help="Prompt tokens run at once [default: the whole prompt, at most 64]."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random prompt.")] = 0,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that loading or one run may take.")] = 600.0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the result with every sample, as JSON.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Measure prefill and decode of exported models against a dense baseline, taking turns in one run."""
    result = benchmark(
        artifacts,
        baseline,
        runtime=runtime,
        python=python,
        cores=cores,
        prompt_length=prompt_length,
        decode_tokens=decode_tokens,
        rounds=rounds,
        warmup_rounds=warmup,
        chunk=chunk,
        seed=seed,
        timeout=timeout,
    )
    if output is not None:
        write_json(output, result.to_json())
    if json_output:
        print_json(result.to_json())
        return
    console.print(benchmark_heading(result), markup=False)
    for table in benchmark_tables(result):
        console.print(table)
    for line in benchmark_legend(result):
        console.print(line, markup=False)
