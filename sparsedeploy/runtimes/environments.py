"""Runtimes in environments of their own: made, listed, checked and removed under the user's cache folder.

``CACHE/runtimes/NAME`` holds the environment (``env``), what its installation printed (``install.log``) and, written
last, ``complete.json``: without it, or with another hash of the pinned requirements, the environment is not used.
"""

from __future__ import annotations

import os
import platform
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json
from sparsedeploy.machine import this_machine
from sparsedeploy.reading import read_object
from sparsedeploy.resources import cache_folder, cache_home
from sparsedeploy.runtimes.installation import (
    add_requirements,
    describe,
    fill,
    process_environment,
    python_of,
    venv_command,
)
from sparsedeploy.runtimes.pythons import named_python
from sparsedeploy.runtimes.specification import Runtime, load_runtime, runtime_names
from sparsedeploy.runtimes.worker import Worker

MARKER_FILE = "complete.json"


@dataclass(frozen=True)
class Environment:
    """A Python that can run a runtime's worker.

    Attributes:
        python: the interpreter of the environment.
    """

    runtime: Runtime
    python: Path

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
        runnable: whether this machine can run it; ``reason`` says why not.
    """

    name: str
    title: str
    summary: str
    state: str
    python: str | None
    versions: dict[str, str]
    path: str
    runnable: bool
    reason: str | None

    @property
    def bytes(self) -> int:
        """Size on disk, counted when asked for, which takes a moment; 0 where it is this Python's own environment."""
        return 0 if self.path == sys.prefix else _size(Path(self.path))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.bytes}


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
                add_requirements(runtime, home, more)
            return status(name)
        command = venv_command(runtime, python)
        home.mkdir(parents=True, exist_ok=True)
        (home / MARKER_FILE).unlink(missing_ok=True)
        shutil.rmtree(home / "env", ignore_errors=True)
        log = home / "install.log"
        with open(log, "w", encoding="utf-8") as file:
            fill(runtime, command, home / "env", file, log)
        marker = describe(runtime, home / "env", log)
        write_json(home / MARKER_FILE, {"requirements_sha256": runtime.requirements_sha256, **marker})
        if more is not None:
            add_requirements(runtime, home, more)
    return status(name)


def remove(name: str) -> int:
    """Delete the environment of a runtime; returns the bytes freed.

    Raises:
        UserError: no such runtime, or it is not installed.
    """
    runtime = load_runtime(name)
    name = runtime.name
    if not runtime.own_environment:
        raise UserError(f"runtime {name} is part of sparsedeploy's own environment", "Uninstall sparsedeploy itself.")
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
        return Environment(runtime, named_python(runtime, python))
    if not runtime.own_environment:
        return Environment(runtime, Path(sys.executable))
    name = runtime.name
    home = _home(name)
    state = _state(runtime, home, _read_marker(home))
    if state != "installed":
        problem = {
            "not installed": "is not installed",
            "incomplete": "is not completely installed (an installation was interrupted)",
            "outdated": "was installed from other pins or sources than this sparsedeploy has",
        }[state]
        raise UserError(f"runtime {name} {problem}", f"Run: sparsedeploy runtime install {name}.")
    return Environment(runtime, python_of(home / "env"))


def check(name: str, python: str | None = None) -> CheckReport:
    """Start the runtime, let it examine the processor and run a small product on the engine.

    Raises:
        UserError: it is not installed, does not start, or computes something wrong.
    """
    environment = require(name, python)
    with environment.worker(timeout=120) as worker:
        reply = worker.call("check")
    return CheckReport(name=environment.runtime.name, interpreter=str(environment.python), **reply)


def _home(name: str) -> Path:
    return cache_home() / "runtimes" / name


def _read_marker(home: Path) -> dict[str, Any]:
    """The marker of a complete installation; empty when there is none or it cannot be read."""
    try:
        return read_object(home / MARKER_FILE, fix="Install the runtime again.")
    except UserError:
        return {}


def _state(runtime: Runtime, home: Path, marker: dict[str, Any]) -> str:
    if not home.is_dir():
        return "not installed"
    if not marker or not python_of(home / "env").exists():
        return "incomplete"
    return "installed" if marker.get("requirements_sha256") == runtime.requirements_sha256 else "outdated"


def _size(folder: Path) -> int:
    """Bytes that a folder takes on disk (links are not followed)."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            about = os.lstat(os.path.join(place, name))
            total += about.st_size if stat.S_ISREG(about.st_mode) else 0
    return total


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
