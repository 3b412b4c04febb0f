"""``sparsedeploy generate``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsedeploy import progress
from sparsedeploy.cli.common import CoresOption, DtypeOption, JsonOption, RuntimePythonOption, named_dtype, print_json
from sparsedeploy.cli.flags import refuse_typed
from sparsedeploy.runtimes.engine import find_deployment, load
from sparsedeploy.runtimes.text import load_text_tools


def generate_command(
    context: typer.Context,
    artifact: Annotated[Path, typer.Argument(help="Exported folder.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draws at a temperature above 0.")] = 0,
    runtime: Annotated[
        str | None, typer.Option("--runtime", help="Engine to run on [default: the artifact's own].")
    ] = None,
    python: RuntimePythonOption = None,
    cores: CoresOption = None,
    dtype: DtypeOption = "auto",
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that loading or one token may take.")] = 600.0,
    json_output: JsonOption = False,
) -> None:
    """Generate text with an exported model on its engine."""
    if temperature == 0:
        refuse_typed(context, ("seed",), "at temperature 0 nothing is drawn")
    tools = load_text_tools(artifact)
    deployment = find_deployment(artifact, runtime, python)
    tokens = tools.encode(prompt)
    show: Callable[[str], Any] = (lambda text: None) if json_output else _print_piece
    progress.note("load the model")
    started = time.perf_counter()
    with load(
        deployment,
        prompt_length=len(tokens),
        new_tokens=max_new_tokens,
        cores=cores,
        dtype=named_dtype(dtype),
        timeout=timeout,
    ) as model:
        loaded = time.perf_counter()
        new: list[int] = []
        for token in model.generate(tokens, max_new_tokens, temperature, seed, tools.stop):
            new.append(token)
            show(tools.next_piece(new))
        ended = time.perf_counter()
    text = tools.decode(new)
    show(tools.last_piece(new) + "\n")
    if json_output:
        print_json(
            {
                "prompt": prompt,
                "text": text,
                "prompt_tokens": tokens,
                "tokens": new,
                "load_seconds": loaded - started,
                "seconds": ended - loaded,
            }
        )
        return
    progress.note(f"{len(new)} tokens in {ended - loaded:.2f} s, after {loaded - started:.1f} s to load")


def _print_piece(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
