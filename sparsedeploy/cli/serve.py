"""``sparsedeploy serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsedeploy import progress
from sparsedeploy.cli.common import CoresOption, console
from sparsedeploy.cli.process import Stop


def serve_command(
    artifact: Annotated[Path, typer.Argument(help="Exported folder, for deepsparse, llamacpp or vllm.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", help="Port to listen on.")] = 8000,
    length: Annotated[int, typer.Option("--length", help="Tokens of a prompt and its answer together.")] = 512,
    cores: CoresOption = None,
    python: Annotated[
        str | None, typer.Option("--python", help="Interpreter of an environment of your own that has the engine.")
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that the start may take.")] = 600.0,
) -> None:
    """Serve an exported model over HTTP with its engine's own server, until Ctrl-C."""
    from sparsedeploy.runtimes.serving import serve

    progress.note("start the server")
    with serve(artifact, host=host, port=port, length=length, cores=cores, python=python, timeout=timeout) as served:
        try:
            console.print(f"{served.runtime} answers at {served.url}, log: {served.log}", markup=False, soft_wrap=True)
            console.print(
                f"curl -H 'Content-Type: application/json' {served.url} -d '{served.request}'",
                markup=False,
                soft_wrap=True,
            )
            served.wait()
        except Stop:  # Ctrl-C, or SIGTERM from a service manager
            progress.note("stop the server")
