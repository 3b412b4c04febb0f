"""The options that decide a plan, shared by ``prune`` and ``allocate``."""

from __future__ import annotations

from typing import Annotated

import typer

SparsityOption = Annotated[
    float | None, typer.Option("--sparsity", "-s", help="Fraction of decoder-linear weights to remove: 0.7.")
]
MethodOption = Annotated[str, typer.Option("--method", "-m", help="magnitude, wanda or sparsegpt.")]
MethodOptionsOption = Annotated[
    list[str] | None, typer.Option("--method-option", help="NAME=VALUE for the method, such as block=64.")
]
AllocationOption = Annotated[
    str,
    typer.Option(
        "--allocation",
        "-a",
        help="How sparsity is spread over layers: uniform, owl, dlp, alphapruning, atp, lsa or rmi.",
    ),
]
AllocationOptionsOption = Annotated[
    list[str] | None,
    typer.Option("--allocation-option", help="NAME=VALUE for the allocation: strength=0.1, granularity=block."),
]
PatternOption = Annotated[
    str,
    typer.Option(
        "--pattern", "-p", help="unstructured; N:M with N of every M kept (2:4, 4:8, 2:8); or mixed-N:M on average."
    ),
]
PatternOptionsOption = Annotated[
    list[str] | None,
    typer.Option("--pattern-option", help="NAME=VALUE for a mixed pattern: strength=1, n_max=4, rule=marginal."),
]
DataOption = Annotated[
    str,
    typer.Option("--data", "-d", help="Calibration text: file, folder, .jsonl, stdlib, c4, datasets:NAME[:CONFIG]."),
]
SamplesOption = Annotated[int, typer.Option("--samples", "-n", help="Calibration sequences.")]
LengthOption = Annotated[
    int | None, typer.Option("--calibration-length", help="Tokens per sequence [default: min(2048, positions)].")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the calibration sampler.")]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        "--batch-size", min=1, help="Sequences per layer call; no effect on results [default: by free memory]."
    ),
]
AccumulateOption = Annotated[
    str,
    typer.Option(
        "--accumulate", help="Sum statistics in float32, or in float64 for the same bits on any process count."
    ),
]
