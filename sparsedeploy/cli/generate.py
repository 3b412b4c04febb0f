"""``sparsedeploy generate``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from sparsedeploy import progress
from sparsedeploy.cli.common import ArtifactArgument, JsonOption, print_json
from sparsedeploy.cli.flags import Given, Section, takes
from sparsedeploy.runtimes.engine import find_deployment, load
from sparsedeploy.runtimes.options import EngineOptions, GenerateOptions
from sparsedeploy.runtimes.text import load_text_tools


@takes(Section("generate", GenerateOptions), Section("engine", EngineOptions))
def generate_command(
    artifact: ArtifactArgument,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    given: Given,
    json_output: JsonOption = False,
) -> None:
    """Generate text with an exported model on its engine."""
    asked, engine = given.build("generate", GenerateOptions), given.build("engine", EngineOptions)
    tools = load_text_tools(artifact)
    deployment = find_deployment(artifact, engine.runtime, engine.python)
    tokens = tools.encode(prompt)
    show: Callable[[str], Any] = (lambda text: None) if json_output else _print_piece
    progress.note("load the model")
    started = time.perf_counter()
    with load(
        deployment,
        prompt_length=len(tokens),
        new_tokens=asked.max_new_tokens,
        cores=engine.cores,
        dtype=engine.computes_in,
        timeout=engine.timeout,
    ) as model:
        loaded = time.perf_counter()
        new: list[int] = []
        for token in model.generate(tokens, asked.max_new_tokens, asked.temperature, asked.seed, tools.stop):
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
