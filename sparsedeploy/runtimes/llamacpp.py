"""Where llama.cpp was built: beside its environment, by ``export/llamacpp/after_install.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsedeploy.errors import UserError
from sparsedeploy.runtimes.environments import Environment
from sparsedeploy.runtimes.specification import load_runtime


@dataclass(frozen=True)
class Build:
    """Folders of llama.cpp's sources and programs, and the library of the backend for sparse weights."""

    source: Path
    binary: Path
    backend: Path

    def program(self, name: str) -> Path:
        """One of llama.cpp's programs, such as ``llama-server``."""
        return self.binary / "bin" / name


def build_of(environment: Environment) -> Build:
    """The build that belongs to an environment.

    Raises:
        UserError: there is none.
    """
    # .../env/bin/python -> .../build
    folder = environment.python.parent.parent.parent / "build"
    versions = sorted(path.name.partition("-")[2] for path in folder.glob("backend-*"))
    if not versions:
        raise UserError(f"there is no llama.cpp in {folder}", "Run: sparsedeploy runtime install llamacpp.")
    version = versions[-1]
    return Build(
        folder / f"source-{version}",
        folder / f"llama.cpp-{version}",
        folder / f"backend-{version}" / "libsparsedeploy-llamacpp.so",
    )


def offer() -> tuple[str, ...]:
    """The option with which llama.cpp's programs (but for llama-bench) load the backend for sparse weights."""
    server = load_runtime("llamacpp").server
    assert server is not None
    return server.arguments
