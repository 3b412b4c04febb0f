"""Fill a runtime's environment: by uv where it is installed and can, else by venv and pip; everything is logged."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.runtimes.process_group import GuardedProcess
from sparsedeploy.runtimes.pythons import find_python, version_text
from sparsedeploy.runtimes.specification import Runtime

# They would point the environment's Python or pip to somewhere else than the environment.
_FOREIGN_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_PYTHON")


def process_environment(runtime: Runtime) -> dict[str, str]:
    """Environment variables for the runtime's processes: the user's, less those of other Pythons, plus its own."""
    inherited = {key: value for key, value in os.environ.items() if key not in _FOREIGN_VARIABLES}
    return {**inherited, **runtime.environment}


def python_of(env: Path) -> Path:
    return env / "Scripts" / "python.exe" if os.name == "nt" else env / "bin" / "python"


def run_code(runtime: Runtime, python: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a few lines in an environment's Python, which imports nothing from the current folder."""
    away = "import sys; sys.path[:] = filter(None, sys.path)\n"
    return subprocess.run(
        [str(python), "-c", away + code, *arguments],
        env=process_environment(runtime),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def venv_command(runtime: Runtime, python: str | None) -> list[str]:
    """The command that makes an environment in the folder that is added to it."""
    running = (sys.version_info.major, sys.version_info.minor)
    uv = shutil.which("uv")
    if uv is None or python is not None or runtime.accepts_python(running):
        return [str(find_python(runtime, python)), "-I", "-m", "venv"]
    low, (major, minor) = runtime.python
    # With pip inside, for what uv cannot install.
    return [uv, "venv", "--no-project", "--seed", "--python", f">={version_text(low)},<{major}.{minor + 1}"]


def fill(runtime: Runtime, command: list[str], env: Path, file: TextIO, log: Path) -> None:
    """Make the environment and install the pinned requirements into it."""
    variables = _install_variables(runtime)
    with progress.bar(f"install {runtime.title}", None) as advance:
        try:
            _run([*command, str(env)], variables, file, log, lambda line: None)
        except UserError:
            if command[1] != "venv":
                raise
            file.write("uv has no Python that fits and cannot fetch one\n")
            _run([str(find_python(runtime)), "-I", "-m", "venv", str(env)], variables, file, log, lambda line: None)

        def show(line: str) -> None:
            found = re.match(r"(Collecting|Installing|Downloading|Prepared|Resolved)\s+(\S+)", line)
            if found:
                advance(1, f"{found[1].lower()} {found[2][:40]}")

        def show_build(line: str) -> None:
            # How ninja counts its steps.
            found = re.match(r"\[(\d+/\d+)\]", line)
            if found:
                advance(1, f"building {found[1]}")

        _install(env, [runtime.requirements], variables, file, log, show)
        if runtime.after_install is not None:
            # It is told where this sparsedeploy and the runtime's own package are.
            folders = [str(Path(__file__).resolve().parents[1]), str(runtime.folder / f"sparsedeploy_{runtime.name}")]
            finish = [str(python_of(env)), str(runtime.after_install), *folders]
            _run(finish, variables, file, log, show_build)


def add_requirements(runtime: Runtime, home: Path, more: Path) -> None:
    """Install more pinned requirements into a complete environment, whose own pins stay as they are."""
    log = home / "install.log"
    with open(log, "a", encoding="utf-8") as file, progress.bar(f"add to {runtime.title}", None) as advance:

        def show(line: str) -> None:
            advance(1, line[:40])

        _install(home / "env", [runtime.requirements, more], _install_variables(runtime), file, log, show)


def _install_variables(runtime: Runtime) -> dict[str, str]:
    return {**process_environment(runtime), "PIP_USER": "0"}


def _install(
    env: Path,
    requirements: list[Path],
    variables: dict[str, str],
    file: TextIO,
    log: Path,
    show: Callable[[str], None],
) -> None:
    """Install requirements with uv where it is there, else, or where that fails, with the environment's own pip."""
    python = str(python_of(env))
    files = [argument for path in requirements for argument in ("-r", str(path))]
    if (uv := shutil.which("uv")) is not None:
        try:
            _run([uv, "pip", "install", "--python", python, *files], variables, file, log, show)
            return
        except UserError:
            file.write("uv failed; pip, with the user's configuration of it, is tried\n")
    pip = [python, "-I", "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    _run([*pip, *files], variables, file, log, show)


def _run(command: list[str], variables: dict[str, str], file: TextIO, log: Path, show: Callable[[str], None]) -> None:
    """Run a step of the installation, its output going to the log and, line by line, to ``show``."""
    file.write(f"$ {' '.join(command)}\n")
    file.flush()
    last: deque[str] = deque(maxlen=3)
    with tempfile.TemporaryDirectory(prefix="sparsedeploy-install-") as scratch:
        # Compilers that it started end with it.
        group = GuardedProcess(
            command,
            Path(scratch),
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        process = group.popen
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if line.strip() and not line.lstrip().startswith(("WARNING", "[notice]")):
                    last.append(line.strip())
                show(line.strip())
            code = process.wait()
        finally:
            group.end(0)
    if code != 0:
        raise UserError(
            f"the installation failed: {' | '.join(last) or f'exit code {code}'}",
            f"Fix that and run the command again. The whole log: {log}.",
        )


def describe(runtime: Runtime, env: Path, log: Path) -> dict[str, Any]:
    """Import the runtime in its environment; returns the versions that it has there."""
    code = (
        "import importlib, json, platform\n"
        "from importlib.metadata import version\n"
        "modules, names = json.loads(sys.argv[1])\n"
        "for module in modules: importlib.import_module(module)\n"
        "print()\n"
        "print(json.dumps({'python': platform.python_version(), 'versions': {name: version(name) for name in names}}))"
    )
    arguments = json.dumps([runtime.imports, runtime.versions])
    done = run_code(runtime, python_of(env), code, arguments)
    if done.returncode != 0:
        with open(log, "a", encoding="utf-8") as file:
            file.write(done.stderr)
        last = " | ".join(done.stderr.strip().splitlines()[-2:])
        raise UserError(f"{runtime.title} was installed but does not start: {last}", f"The whole log: {log}.")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
