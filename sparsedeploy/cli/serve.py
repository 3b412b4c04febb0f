"""``sparsedeploy serve``."""

from __future__ import annotations

from sparsedeploy import progress
from sparsedeploy.cli.common import ArtifactArgument, console
from sparsedeploy.cli.flags import Given, Section, takes
from sparsedeploy.cli.process import Stop
from sparsedeploy.runtimes.options import EngineOptions, ServeOptions


@takes(Section("serve", ServeOptions), Section("engine", EngineOptions, without=("runtime", "dtype")))
def serve_command(artifact: ArtifactArgument, given: Given) -> None:
    """Serve an exported model over HTTP with its engine's own server, until Ctrl-C."""
    from sparsedeploy.runtimes.serving import serve

    asked, engine = given.build("serve", ServeOptions), given.build("engine", EngineOptions)
    progress.note("start the server")
    with serve(artifact, asked, engine) as served:
        try:
            console.print(
                f"{served.runtime} is listening at {served.url}, log: {served.log}", markup=False, soft_wrap=True
            )
            console.print(
                f"curl -H 'Content-Type: application/json' {served.url} -d '{served.request}'",
                markup=False,
                soft_wrap=True,
            )
            served.wait()
        except Stop:  # Ctrl-C, or SIGTERM from a service manager
            progress.note("stop the server")
