"""Serve an exported folder over HTTP with the engine's own server, in its own environment."""

from __future__ import annotations

import os
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

from sparsedeploy.artifacts.companions import TOKENIZER_CONFIG, older_tokenizer
from sparsedeploy.artifacts.description import load_artifact
from sparsedeploy.artifacts.known_answer import PROMPT, STEPS
from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json
from sparsedeploy.reading import SOUND_COPY, read_object
from sparsedeploy.runtimes.engine import Deployment, check_cores, environment_for, prove_once
from sparsedeploy.runtimes.environments import Environment
from sparsedeploy.runtimes.installation import process_environment
from sparsedeploy.runtimes.llamacpp import OFFER, build_of
from sparsedeploy.runtimes.process_group import GuardedProcess
from sparsedeploy.runtimes.worker import new_log, telling_lines

_MODEL = "model"


@dataclass(frozen=True)
class Served:
    """A server that answers.

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
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    length: int = 512,
    cores: int | None = None,
    python: str | None = None,
    timeout: float = 600.0,
) -> Iterator[Served]:
    """Start the server of the artifact's engine, wait until it answers, and stop it at the end of the block.

    Args:
        host: the address to listen on.
        length: tokens of a prompt and its answer together, at most.
        cores: threads to use; by default all cores that this process may use.
        python: interpreter of an environment of the user's own that has the engine and its server.
        timeout: seconds that the start may take.

    Raises:
        UserError: not an artifact, an engine without a server or whose server is not installed, a port in use, or a
            server that dies or does not answer in time.
    """
    artifact = load_artifact(folder)
    limit = artifact.shapes.max_positions
    if length < 2 or (limit is not None and length > limit):
        raise UserError(
            f"a length of {length} tokens does not fit the model's {limit} positions", "Use another --length."
        )
    cores = check_cores(cores)
    environment = environment_for(artifact, folder, None, python)
    name = environment.runtime.name
    if name not in ("deepsparse", "llamacpp", "vllm"):
        raise UserError(f"runtime {name} has no server", "Export with --target deepsparse, llamacpp or vllm.")
    _check_port(host, port)
    chunk = min(64, max(4, length // 4 // 4 * 4))
    # The engine's own server is not asked for logits: its engine proves itself in the worker, loaded alike.
    prompt_length = max(1, min(PROMPT, length - STEPS))
    sizes = {"prompt_length": prompt_length, "new_tokens": min(STEPS, length - prompt_length)}
    prove_once(Deployment(folder, artifact, environment), **sizes, cores=cores, chunk=chunk, timeout=timeout)
    variables = process_environment(environment.runtime)
    scratch = Path(tempfile.mkdtemp(prefix=f"sparsedeploy-serve-{name}-"))
    log = new_log(f"{name}-server")
    try:
        if name == "deepsparse":
            command = _deepsparse(environment, folder, scratch, host, port, length, chunk, cores)
            health, path = "/v2/health/ready", f"/v2/models/{_MODEL}/infer"
            request = '{"sequences": "Once upon", "max_new_tokens": 32}'
        elif name == "llamacpp":
            build = build_of(environment)
            command = [str(build.program("llama-server")), "--model", str(Path(folder).resolve() / "model.gguf")]
            command += ["--host", host, "--port", str(port), "--ctx-size", str(length), "--threads", str(cores)]
            command += ["--alias", _MODEL, "--parallel", "1", "--offline", "--no-webui", *OFFER]
            # So that the log says what was packed.
            command += ["--verbosity", "4"]
            variables["GGML_BACKEND_PATH"] = str(build.backend)
            health, path = "/health", "/v1/completions"
            request = f'{{"model": "{_MODEL}", "prompt": "Once upon", "max_tokens": 32}}'
        else:
            command = _vllm(environment, folder, host, port, length)
            variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
            variables.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, _first_cores(cores))))
            health, path = "/health", "/v1/completions"
            request = f'{{"model": "{_MODEL}", "prompt": "Once upon", "max_tokens": 32}}'
        with open(log, "wb") as output:
            group = GuardedProcess(
                command,
                scratch,
                env=variables,
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            root = f"http://{host}:{port}"
            _wait(name, group.popen, f"{root}{health}", log, timeout)
            yield Served(name, f"{root}{path}", request, log, group.popen)
        finally:
            group.send(signal.SIGTERM)
            group.end(10)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _deepsparse(
    environment: Environment, folder: Path, scratch: Path, host: str, port: int, length: int, chunk: int, cores: int
) -> list[str]:
    """``deepsparse.server`` on a copy of the folder: the engine writes the sizes into its graph."""
    found = subprocess.run(
        [str(environment.python), "-c", "import fastapi, uvicorn, datasets, transformers"],
        env=process_environment(environment.runtime),
        capture_output=True,
        check=False,
    )
    if found.returncode != 0:
        raise UserError(
            "the server of deepsparse is not installed", "Run: sparsedeploy runtime install deepsparse --with server."
        )
    shutil.copytree(folder, scratch / _MODEL)
    settings = scratch / _MODEL / TOKENIZER_CONFIG
    if settings.is_file():
        write_json(settings, older_tokenizer(read_object(settings, fix=SOUND_COPY)))
    endpoint = {
        "name": _MODEL,
        "task": "text_generation",
        "model": str(scratch / _MODEL),
        "kwargs": {"sequence_length": length, "prompt_sequence_length": chunk},
    }
    # JSON is YAML too.
    write_json(scratch / "server.yaml", {"num_cores": cores, "num_workers": 1, "endpoints": [endpoint]})
    start = "from deepsparse.server.cli import main; main()"
    options = ["--config_file", str(scratch / "server.yaml"), "--host", host, "--port", str(port)]
    return [str(environment.python), "-c", start, *options]


def _vllm(environment: Environment, folder: Path, host: str, port: int, length: int) -> list[str]:
    options = ["--host", host, "--port", str(port), "--max-model-len", str(length), "--served-model-name", _MODEL]
    return [str(environment.python.parent / "vllm"), "serve", str(folder.resolve()), *options]


def _first_cores(count: int) -> list[int]:
    return sorted(os.sched_getaffinity(0))[:count] if hasattr(os, "sched_getaffinity") else list(range(count))


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"cannot listen on {host}:{port} ({reason})", "Use another --port or --host.") from error


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
