"""Runtimes in environments of their own: made, listed, checked and removed under the user's cache folder.

``CACHE/runtimes/NAME`` holds the environment (``env``), what its installation printed (``install.log``) and, written
last, ``complete.json``: without it, or with another hash of the pinned requirements, the environment is not used.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json
from sparsedeploy.reading import read_object
from sparsedeploy.resources import cache_folder, cache_home
from sparsedeploy.runtimes.machine import this_machine
from sparsedeploy.runtimes.specification import Runtime, Version, load_runtime, runtime_names
from sparsedeploy.runtimes.worker import Worker

MARKER_FILE = "complete.json"
# They would point the environment's Python or pip to somewhere else than the environment.
_FOREIGN_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_PYTHON")


@dataclass(frozen=True)
class Environment:
    """A Python that can run a runtime's worker.

    Attributes:
        python: the interpreter of the environment.
        managed: made by :func:`install`, as against one that the user named.
    """

    runtime: Runtime
    python: Path
    managed: bool

    def worker(self, timeout: float = 600.0) -> Worker:
        """Start the runtime's worker in this environment; ``timeout`` is in seconds, for one request."""
        return Worker(
            [str(self.python), str(self.runtime.worker)],
            name=self.runtime.name,
            environment=process_environment(self.runtime),
            timeout=timeout,
        )


@dataclass(frozen=True)
class Status:
    """What is there of a runtime.

    Attributes:
        state: ``installed``, ``not installed``, ``incomplete`` (an interrupted installation) or ``outdated`` (the
            pinned requirements have changed since).
        python: version of the environment's Python.
        versions: distribution -> version, of those worth showing.
        bytes: size on disk.
        runnable: whether this machine can run it; ``reason`` says why not.
    """

    name: str
    title: str
    summary: str
    state: str
    python: str | None
    versions: dict[str, str]
    path: str
    bytes: int
    runnable: bool
    reason: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class CheckReport:
    """What the runtime's own process says about itself and this processor.

    Attributes:
        largest_difference: between the engine's and numpy's result of a small matrix product.
    """

    name: str
    interpreter: str
    python: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    largest_difference: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def list_runtimes() -> list[Status]:
    """The state of every runtime that this installation ships."""
    return [status(name) for name in runtime_names()]


def status(name: str) -> Status:
    """The state of one runtime.

    Raises:
        UserError: no such runtime.
    """
    runtime = load_runtime(name)
    home = _home(runtime.name)
    marker = _read_marker(home)
    reason = runtime.why_not_here(this_machine())
    if not runtime.own_environment:
        return Status(
            name=runtime.name,
            title=runtime.title,
            summary=runtime.summary,
            state="installed",
            python=platform.python_version(),
            versions={name: metadata.version(name) for name in runtime.versions},
            path=sys.prefix,
            bytes=0,
            runnable=reason is None,
            reason=reason,
        )
    return Status(
        name=runtime.name,
        title=runtime.title,
        summary=runtime.summary,
        state=_state(runtime, home, marker),
        python=marker.get("python"),
        versions=marker.get("versions", {}),
        path=str(home),
        bytes=_size(home),
        runnable=reason is None,
        reason=reason,
    )


def install(name: str, python: str | None = None, extra: str | None = None) -> Status:
    """Make the environment of a runtime, or leave it as it is when it is complete and its pins are unchanged.

    An interrupted installation is done again from the start, less what was built by then. Where uv is installed it
    makes the environment, fetching a Python that fits when there is none, and fills it; else, or where uv cannot (it
    does not read pip's configuration), venv and the environment's own pip do. Nothing outside
    ``CACHE/runtimes/NAME`` and uv's own folders changes.

    Args:
        python: the Python to make it from; by default the running one if it fits, else one that is found.
        extra: also install what ``requirements-EXTRA.txt`` beside the runtime's requirements pins.

    Raises:
        UserError: this machine cannot run it, no such extra, no fitting Python, or the installation failed.
    """
    runtime = load_runtime(name)
    reason = runtime.why_not_here(this_machine())
    if reason is not None:
        raise UserError(reason, "Use another runtime or another machine.")
    missing = runtime.missing_tool()
    if missing is not None:
        raise UserError(f"{runtime.title} is built on this machine, which lacks {missing}", "Install it and try again.")
    name = runtime.name
    more = None if extra is None else runtime.folder / f"requirements-{extra}.txt"
    if more is not None and not more.is_file():
        raise UserError(f"runtime {name} has no extra '{extra}'", "Leave --with out.")
    if not runtime.own_environment:
        return status(name)
    home = _home(name)
    with _lock(name):
        if _state(runtime, home, _read_marker(home)) == "installed" and python is None:
            if more is not None:
                _add(runtime, home, more)
            return status(name)
        command = _venv_command(runtime, python)
        home.mkdir(parents=True, exist_ok=True)
        (home / MARKER_FILE).unlink(missing_ok=True)
        shutil.rmtree(home / "env", ignore_errors=True)
        log = home / "install.log"
        with open(log, "w", encoding="utf-8") as file:
            _fill(runtime, command, home / "env", file, log)
        marker = _describe(runtime, home / "env", log)
        write_json(home / MARKER_FILE, {"requirements_sha256": runtime.requirements_sha256, **marker})
        if more is not None:
            _add(runtime, home, more)
    return status(name)


def remove(name: str) -> int:
    """Delete the environment of a runtime; returns the bytes freed.

    Raises:
        UserError: no such runtime, or it is not installed.
    """
    runtime = load_runtime(name)
    name = runtime.name
    if not runtime.own_environment:
        raise UserError(f"runtime {name} is a part of sparsedeploy's own environment", "Uninstall sparsedeploy itself.")
    home = _home(name)
    with _lock(name):
        if not home.is_dir():
            raise UserError(f"runtime {name} is not installed", "See: sparsedeploy runtime list.")
        freed = _size(home)
        (home / MARKER_FILE).unlink(missing_ok=True)
        shutil.rmtree(home)
    return freed


def require(name: str, python: str | None = None) -> Environment:
    """The environment to run a runtime in: the managed one, or the user's own when ``python`` names its interpreter.

    Raises:
        UserError: this machine cannot run it, it is not (completely) installed, or ``python`` is not a fitting Python.
    """
    runtime = load_runtime(name)
    reason = runtime.why_not_here(this_machine())
    if reason is not None:
        raise UserError(reason, "Use another runtime or another machine.")
    if python is not None:
        return Environment(runtime, _named_python(runtime, python), managed=False)
    if not runtime.own_environment:
        return Environment(runtime, Path(sys.executable), managed=False)
    name = runtime.name
    home = _home(name)
    state = _state(runtime, home, _read_marker(home))
    if state != "installed":
        problem = {
            "not installed": "is not installed",
            "incomplete": "is not completely installed (an installation was interrupted)",
            "outdated": "was installed with other pinned versions than this sparsedeploy needs",
        }[state]
        raise UserError(f"runtime {name} {problem}", f"Run: sparsedeploy runtime install {name}.")
    return Environment(runtime, _python_of(home / "env"), managed=True)


def check(name: str, python: str | None = None) -> CheckReport:
    """Start the runtime, let it examine the processor and run a small product on the engine.

    Raises:
        UserError: it is not installed, does not start, or computes something wrong.
    """
    environment = require(name, python)
    with environment.worker(timeout=120) as worker:
        reply = worker.call("check")
    return CheckReport(name=environment.runtime.name, interpreter=str(environment.python), **reply)


def find_python(runtime: Runtime, python: str | None = None) -> Path:
    """A Python that the runtime supports: the named one, the running one, or the newest on PATH or of pyenv.

    Raises:
        UserError: the named one does not fit, or none was found.
    """
    if python is not None:
        return _named_python(runtime, python)
    running = (sys.version_info.major, sys.version_info.minor)
    candidates = [Path(sys.executable)] if runtime.accepts_python(running) else []
    candidates.extend(_installed_pythons(runtime))
    for candidate in candidates:
        version = _version_of(candidate)
        if version is not None and runtime.accepts_python(version):
            return candidate
    low, high = runtime.python
    here = f"{running[0]}.{running[1]}"
    word = "new" if running > high else "old"
    raise UserError(
        f"Python {here} is too {word} for {runtime.title} (needs {_text(low)} to {_text(high)}) and no other was found",
        f"Install uv, which fetches one, or Python {_text(high)}, and run: sparsedeploy runtime install {runtime.name} "
        f"--python /path/to/python{_text(high)}.",
    )


def process_environment(runtime: Runtime) -> dict[str, str]:
    """Environment variables for the runtime's processes: the user's, less those of other Pythons, plus its own."""
    inherited = {key: value for key, value in os.environ.items() if key not in _FOREIGN_VARIABLES}
    return {**inherited, **runtime.environment}


def _home(name: str) -> Path:
    return cache_home() / "runtimes" / name


def _python_of(env: Path) -> Path:
    return env / "Scripts" / "python.exe" if os.name == "nt" else env / "bin" / "python"


def _read_marker(home: Path) -> dict[str, Any]:
    """The marker of a complete installation; empty when there is none or it cannot be read."""
    try:
        return read_object(home / MARKER_FILE, fix="Install the runtime again.")
    except UserError:
        return {}


def _state(runtime: Runtime, home: Path, marker: dict[str, Any]) -> str:
    if not home.is_dir():
        return "not installed"
    if not marker or not _python_of(home / "env").exists():
        return "incomplete"
    return "installed" if marker.get("requirements_sha256") == runtime.requirements_sha256 else "outdated"


def _size(folder: Path) -> int:
    """Bytes that a folder takes on disk (links are not followed)."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            total += path.stat().st_size
    return total


def _named_python(runtime: Runtime, python: str) -> Path:
    found = shutil.which(os.path.expanduser(python))
    version = None if found is None else _version_of(Path(found))
    if found is None or version is None:
        raise UserError(
            f"{python} is not a Python that runs", "Give the path of an interpreter, such as /usr/bin/python3.11."
        )
    if not runtime.accepts_python(version):
        low, high = runtime.python
        word = "new" if version > high else "old"
        raise UserError(
            f"Python {_text(version)} at {python} is too {word} for {runtime.title} "
            f"(needs {_text(low)} to {_text(high)})",
            f"Give another: --python /path/to/python{_text(high)}.",
        )
    # Not resolved: the link inside an environment is what makes it that environment's Python.
    return Path(found).absolute()


def _installed_pythons(runtime: Runtime) -> Iterator[Path]:
    """Interpreters of supported versions, newest first."""
    low, high = runtime.python
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for minor in range(high[1], low[1] - 1, -1):
        name = f"python{high[0]}.{minor}"
        for folder in os.get_exec_path():
            if (Path(folder) / name).is_file():
                yield Path(folder) / name
        yield from sorted(pyenv.glob(f"versions/{high[0]}.{minor}*/bin/{name}"), reverse=True)


def _version_of(python: Path) -> Version | None:
    """(major, minor) of an interpreter that runs and can make environments, else None."""
    code = "import sys, venv, ensurepip; print(sys.version_info[0], sys.version_info[1])"
    try:
        done = subprocess.run(
            [str(python), "-I", "-c", code],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        major, minor = done.stdout.split()
        return int(major), int(minor)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _venv_command(runtime: Runtime, python: str | None) -> list[str]:
    """The command that makes an environment in the folder that is added to it."""
    running = (sys.version_info.major, sys.version_info.minor)
    uv = shutil.which("uv")
    if uv is None or python is not None or runtime.accepts_python(running):
        return [str(find_python(runtime, python)), "-m", "venv"]
    low, (major, minor) = runtime.python
    # With pip inside, for what uv cannot install.
    return [uv, "venv", "--no-project", "--seed", "--python", f">={_text(low)},<{major}.{minor + 1}"]


def _fill(runtime: Runtime, command: list[str], env: Path, file: TextIO, log: Path) -> None:
    """Make the environment and install the pinned requirements into it."""
    variables = _install_variables(runtime)
    with progress.bar(f"install {runtime.title}", None) as advance:
        try:
            _run([*command, str(env)], variables, file, log, lambda line: None)
        except UserError:
            if command[1] != "venv":
                raise
            file.write("uv has no Python that fits and cannot fetch one\n")
            _run([str(find_python(runtime)), "-m", "venv", str(env)], variables, file, log, lambda line: None)

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
            finish = [str(_python_of(env)), str(runtime.after_install), *folders]
            _run(finish, variables, file, log, show_build)


def _add(runtime: Runtime, home: Path, more: Path) -> None:
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
    python = str(_python_of(env))
    files = [argument for path in requirements for argument in ("-r", str(path))]
    if (uv := shutil.which("uv")) is not None:
        try:
            _run([uv, "pip", "install", "--python", python, *files], variables, file, log, show)
            return
        except UserError:
            file.write("uv failed; pip, with the user's configuration of it, is tried\n")
    pip = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    _run([*pip, *files], variables, file, log, show)


def _run(command: list[str], variables: dict[str, str], file: TextIO, log: Path, show: Callable[[str], None]) -> None:
    """Run a step of the installation, its output going to the log and, line by line, to ``show``."""
    file.write(f"$ {' '.join(command)}\n")
    file.flush()
    last: deque[str] = deque(maxlen=3)
    process = subprocess.Popen(
        command,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
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
        if process.poll() is None:
            process.kill()
            process.wait()
    if code != 0:
        raise UserError(
            f"the installation failed: {' | '.join(last) or f'exit code {code}'}",
            f"Mend that and run the command again. The whole log: {log}.",
        )


def _describe(runtime: Runtime, env: Path, log: Path) -> dict[str, Any]:
    """Import the runtime in its environment; returns the versions that it has there."""
    code = (
        "import importlib, json, platform, sys\n"
        "from importlib.metadata import version\n"
        "modules, names = json.loads(sys.argv[1])\n"
        "for module in modules: importlib.import_module(module)\n"
        "print()\n"
        "print(json.dumps({'python': platform.python_version(), 'versions': {name: version(name) for name in names}}))"
    )
    arguments = json.dumps([runtime.imports, runtime.versions])
    done = subprocess.run(
        [str(_python_of(env)), "-c", code, arguments],
        env=process_environment(runtime),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        with open(log, "a", encoding="utf-8") as file:
            file.write(done.stderr)
        last = " | ".join(done.stderr.strip().splitlines()[-2:])
        raise UserError(f"{runtime.title} was installed but does not start: {last}", f"The whole log: {log}.")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@contextmanager
def _lock(name: str) -> Iterator[None]:
    """Let one process at a time change a runtime's environment; a second one waits."""
    lock = FileLock(cache_folder("runtimes") / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.note(f"waiting for another process that changes runtime {name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
