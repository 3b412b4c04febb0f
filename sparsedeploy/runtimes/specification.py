"""What ``export/NAME/runtime.yaml`` says about a runtime, and whether this machine can run it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparsedeploy.errors import UserError
from sparsedeploy.machine import Machine
from sparsedeploy.resources import shipped

SPECIFICATION_FILE = "runtime.yaml"
REQUIREMENTS_FILE = "requirements.txt"
WORKER_FILE = "worker.py"
SERVER_FILE = "server.py"
AFTER_INSTALL_FILE = "after_install.py"

Version = tuple[int, int]


@dataclass(frozen=True)
class Server:
    """A runtime's own HTTP server, which ``server.py`` beside the specification starts.

    Attributes:
        health: path that answers once the server is ready.
        path: where requests are posted; ``request`` is an example of a body, as JSON.
        imports: modules that it needs beyond the runtime's own; ``extra`` installs them
            (``runtime install NAME --with EXTRA``).
        parallel: requests that are computed at once unless another number is asked for; 1: the engine takes no more.
        arguments: what the engine's own server is called with besides.
        environment: variables that it gets beyond the runtime's own.
    """

    health: str
    path: str
    request: str
    imports: tuple[str, ...] = ()
    extra: str | None = None
    parallel: int = 1
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Runtime:
    """A runtime that lives in its own environment.

    Attributes:
        name: what the user types; the folder under ``export/``.
        aliases: other names that the user may type.
        title: its proper name.
        summary: one line.
        targets: export targets whose artifacts it runs.
        versions: distributions whose versions are worth showing.
        python: lowest and highest Python (major, minor) that it supports.
        systems: operating systems it supports, as ``platform.system()`` names them.
        machines: machine -> processor flags of which one must be there.
        imports: modules that must import for the environment to count as working.
        environment: variables that its processes get.
        folder: where its requirements and its worker are.
        own_environment: whether it has one; else it runs in the Python that runs sparsedeploy.
        max_batch: sequences that it can run at once.
        fixed_shapes: whether a loaded model takes no longer prompt than it was loaded for, even where there is room.
        takes_dtype: whether it computes in a type of the user's choice, whatever the artifact was exported in.
        log_probabilities: whether its worker's logits are log-probabilities, perhaps not of all tokens.
        server: its own HTTP server; None where it has none.
        profile: whether its worker answers ``profile``, the time of every operator.
        tools: commands of which one must be there to build it, and what to install else.
        built_from: files besides its requirements that it is built from.
    """

    name: str
    title: str
    summary: str
    targets: tuple[str, ...]
    versions: tuple[str, ...]
    python: tuple[Version, Version]
    systems: tuple[str, ...]
    machines: dict[str, tuple[str, ...]]
    imports: tuple[str, ...]
    environment: dict[str, str]
    folder: Path
    aliases: tuple[str, ...] = ()
    max_batch: int = 1
    own_environment: bool = True
    profile: bool = False
    takes_dtype: bool = False
    log_probabilities: bool = False
    server: Server | None = None
    fixed_shapes: bool = False
    tools: tuple[tuple[tuple[str, ...], str], ...] = ()
    built_from: tuple[Path, ...] = ()

    @property
    def requirements(self) -> Path:
        return self.folder / REQUIREMENTS_FILE

    @property
    def requirements_sha256(self) -> str:
        """Of what is pinned and built; a changed comment does not make an environment outdated."""
        lines = (line.partition("#")[0].strip() for line in self.requirements.read_text(encoding="utf-8").splitlines())
        digest = hashlib.sha256("\n".join(line for line in lines if line).encode())
        for path in self.built_from:
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    @property
    def worker(self) -> Path:
        return self.folder / WORKER_FILE

    @property
    def server_program(self) -> Path:
        return self.folder / SERVER_FILE

    @property
    def after_install(self) -> Path | None:
        """A program that finishes the environment, run by its Python after pip; None where there is none."""
        path = self.folder / AFTER_INSTALL_FILE
        return path if path.is_file() else None

    def accepts_python(self, version: Version) -> bool:
        return self.python[0] <= version <= self.python[1]

    def missing_tool(self) -> str | None:
        """What to install before it can be built; None when everything is there."""
        return next((fix for commands, fix in self.tools if not any(map(shutil.which, commands))), None)

    def why_not_here(self, machine: Machine) -> str | None:
        """Why this machine cannot run it; None when it can."""
        if machine.system not in self.systems:
            return f"{self.title} runs on {' and '.join(self.systems)}, this is {machine.system}"
        if machine.machine not in self.machines:
            return f"{self.title} runs on {' and '.join(self.machines)}, this is {machine.machine}"
        flags = self.machines[machine.machine]
        if flags and machine.flags and not set(flags) & set(machine.flags):
            return f"{self.title} needs a processor with {' or '.join(flags)}"
        return None


def runtime_names() -> list[str]:
    """The runtimes that this installation ships, sorted."""
    return [folder.name for folder in _folders()]


def load_runtime(name: str) -> Runtime:
    """Read the specification of a runtime, by its name or one of its aliases.

    Raises:
        UserError: no such runtime.
    """
    runtimes = [_read(folder) for folder in _folders()]
    for runtime in runtimes:
        if name in (runtime.name, *runtime.aliases):
            return runtime
    raise UserError(f"unknown runtime '{name}'", f"Known: {', '.join(runtime_names())}.")


def _folders() -> list[Path]:
    return sorted(path.parent for path in shipped("export").glob(f"*/{SPECIFICATION_FILE}"))


def _read(folder: Path) -> Runtime:
    values = yaml.safe_load((folder / SPECIFICATION_FILE).read_text(encoding="utf-8"))
    return Runtime(
        name=folder.name,
        title=values["title"],
        summary=values["summary"],
        targets=tuple(values["targets"]),
        versions=tuple(values["versions"]),
        python=(_version(values["python"]["min"]), _version(values["python"]["max"])),
        systems=tuple(values["systems"]),
        machines={machine: tuple(flags) for machine, flags in values["machines"].items()},
        imports=tuple(values["imports"]),
        environment=dict(values["environment"]),
        folder=folder,
        aliases=tuple(values.get("aliases", ())),
        own_environment=bool(values.get("own_environment", True)),
        max_batch=int(values.get("max_batch", 1)),
        profile=bool(values.get("profile", False)),
        takes_dtype=bool(values.get("takes_dtype", False)),
        log_probabilities=bool(values.get("log_probabilities", False)),
        server=_server(values.get("server")),
        fixed_shapes=bool(values.get("fixed_shapes", False)),
        tools=tuple((tuple(tool["commands"]), tool["install"]) for tool in values.get("tools", ())),
        built_from=tuple(path for pattern in values.get("built_from", ()) for path in _files(folder, pattern)),
    )


def _server(values: Mapping[str, Any] | None) -> Server | None:
    if values is None:
        return None
    lists = {name: tuple(values.get(name, ())) for name in ("imports", "arguments")}
    return Server(**{**values, **lists})


def _files(folder: Path, pattern: str) -> list[Path]:
    start, _, name = pattern.rpartition("/")
    return sorted(path for path in (folder / start).resolve().glob(name) if path.is_file())


def runtime_for_target(target: str) -> Runtime:
    """The runtime that runs artifacts of that export target: the one of the same name, else the first.

    Raises:
        UserError: none does.
    """
    runtimes = [_read(folder) for folder in _folders()]
    for runtime in sorted(runtimes, key=lambda runtime: runtime.name != target):
        if target in runtime.targets:
            return runtime
    known = ", ".join(sorted({target for runtime in runtimes for target in runtime.targets}))
    raise UserError(f"no runtime here runs an artifact of target '{target}'", f"Export for one of: {known}.")


def _version(text: str) -> Version:
    major, minor = text.split(".")
    return int(major), int(minor)
