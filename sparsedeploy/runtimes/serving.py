"""Serve an exported folder over HTTP with the engine's own server, in its own environment."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sparsedeploy import progress
from sparsedeploy.artifacts.description import load_artifact
from sparsedeploy.artifacts.known_answer import PROMPT, STEPS
from sparsedeploy.errors import UserError
from sparsedeploy.options import one_of
from sparsedeploy.registry import TARGETS
from sparsedeploy.runtimes.engine import Deployment, check_cores, environment_for, prove_once
from sparsedeploy.runtimes.environments import Environment
from sparsedeploy.runtimes.front import Front, Meters
from sparsedeploy.runtimes.installation import process_environment, run_code
from sparsedeploy.runtimes.options import EngineOptions, ServeOptions
from sparsedeploy.runtimes.process_group import GuardedProcess
from sparsedeploy.runtimes.specification import Server, load_runtime, runtime_names
from sparsedeploy.runtimes.worker import new_log, telling_lines


@dataclass(frozen=True)
class Served:
    """A server that answers, also at ``/metrics`` (Prometheus) and ``/health``.

    Attributes:
        url: where to send requests (POST, JSON); ``request`` is an example of a body.
        log: what the server prints.
    """

    runtime: str
    url: str
    request: str
    log: Path
    process: subprocess.Popen[bytes]

    def wait(self) -> None:
        """Wait until the server ends.

        Raises:
            UserError: it ended by itself.
        """
        self.process.wait()
        raise _ended(self.runtime, self.process, self.log, "while it served")


@contextmanager
def serve(
    folder: Path, options: ServeOptions = ServeOptions(), engine: EngineOptions = EngineOptions()
) -> Iterator[Served]:
    """Start the server of the artifact's engine, wait until it answers, and stop it at the end of the block.

    Raises:
        UserError: not an artifact, an engine without a server or whose server is not installed, a port in use, or a
            server that dies or does not answer in time.
    """
    artifact = load_artifact(folder)
    limit, length = artifact.shapes.max_positions, options.length
    if limit is not None and length > limit:
        raise UserError(
            f"a length of {length} tokens does not fit the model's {limit} positions", "Use another --length."
        )
    cores = check_cores(engine.cores)
    environment = environment_for(artifact, folder, engine.runtime, engine.python)
    runtime = environment.runtime
    if runtime.server is None:
        served = {target for one in map(load_runtime, runtime_names()) if one.server for target in one.targets}
        able = sorted(served & {*TARGETS.names()})
        raise UserError(f"runtime {runtime.name} has no server", f"Export with --target {one_of(able)}.")
    parallel = options.parallel or runtime.server.parallel
    if parallel > 1 and runtime.server.parallel == 1:
        raise UserError(
            f"the server of {runtime.name} computes one request at a time", "Leave --parallel out; more requests wait."
        )
    _check_imports(environment, runtime.server)
    chunk = min(64, max(4, length // 4 // 4 * 4))
    # The engine's own server is not asked for logits: its engine proves itself in the worker, loaded alike.
    prompt_length = max(1, min(PROMPT, length - STEPS))
    sizes = {"prompt_length": prompt_length, "new_tokens": min(STEPS, length - prompt_length)}
    meters = Meters(runtime.name, Path(folder).resolve().name)
    inner = _free_port()
    front = _front(options, ("127.0.0.1", inner), meters, runtime.server.health)
    scratch = Path(tempfile.mkdtemp(prefix=f"sparsedeploy-serve-{runtime.name}-"))
    log = new_log(f"{runtime.name}-server")
    asked = {"folder": Path(folder).resolve(), "scratch": scratch, "host": "127.0.0.1", "port": inner}
    asked |= {"length": length, "chunk": chunk, "cores": cores, "parallel": parallel}
    command = [str(environment.python), str(runtime.server_program)]
    command += [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    try:
        deployment = Deployment(folder, artifact, environment)
        prove_once(deployment, **sizes, cores=cores, chunk=chunk, timeout=engine.timeout)
        with open(log, "wb") as output:
            group = GuardedProcess(
                [*command, *runtime.server.arguments],
                scratch,
                env={**process_environment(runtime), **runtime.server.environment},
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            front.start(lambda: group.popen.poll() is None)
            _wait(runtime.name, group.popen, f"http://127.0.0.1:{inner}{runtime.server.health}", log, engine.timeout)
            front.ready = True
            root = f"http://{options.host}:{front.port}"
            yield Served(runtime.name, f"{root}{runtime.server.path}", runtime.server.request, log, group.popen)
        finally:
            if left := front.drain(options.drain):
                progress.note(f"{left} requests did not end within {options.drain:g} s")
            group.send(signal.SIGTERM)
            group.end(10)
    finally:
        front.stop()
        shutil.rmtree(scratch, ignore_errors=True)


def _check_imports(environment: Environment, server: Server) -> None:
    """Refuse an environment that lacks what the server needs beyond the runtime itself.

    Raises:
        UserError: see above.
    """
    if not server.imports:
        return
    found = run_code(environment.runtime, environment.python, f"import {', '.join(server.imports)}")
    if found.returncode != 0:
        name = environment.runtime.name
        raise UserError(
            f"the server of {name} is not installed", f"Run: sparsedeploy runtime install {name} --with {server.extra}."
        )


def _front(options: ServeOptions, upstream: tuple[str, int], meters: Meters, health: str) -> Front:
    """What clients see, on its address from now on.

    Raises:
        UserError: the address cannot be had.
    """
    host, port = options.host, options.port
    try:
        return Front((host, port), upstream, meters, health=health)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot listen on {host}:{port} ({reason})", "Use another --port or --host.") from error


def _free_port() -> int:
    """A port of this machine for the engine alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free: int = probe.getsockname()[1]
    return free


def _wait(name: str, process: subprocess.Popen[bytes], address: str, log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        if time.monotonic() > deadline:
            raise UserError(
                f"the {name} server did not answer within {timeout:g} s: {telling_lines(log)}",
                f"Raise --timeout. Its log: {log}.",
            )
        time.sleep(0.2)
    raise _ended(name, process, log, "during its start")


def _ended(name: str, process: subprocess.Popen[bytes], log: Path, when: str) -> UserError:
    code = process.returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    said = telling_lines(log)
    return UserError(f"the {name} server {how} {when}" + (f": {said}" if said else ""), f"Its log: {log}.")
