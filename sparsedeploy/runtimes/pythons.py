"""Which Python an environment is made from: the named one, the running one, or one that is found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from sparsedeploy.errors import UserError
from sparsedeploy.runtimes.specification import Runtime, Version


def find_python(runtime: Runtime, python: str | None = None) -> Path:
    """A Python that the runtime supports: the named one, the running one, or the newest on PATH or of pyenv.

    Raises:
        UserError: the named one does not fit, or none was found.
    """
    if python is not None:
        return named_python(runtime, python)
    running = (sys.version_info.major, sys.version_info.minor)
    candidates = [Path(sys.executable)] if runtime.accepts_python(running) else []
    candidates.extend(_installed_pythons(runtime))
    for candidate in candidates:
        version = _version_of(candidate)
        if version is not None and runtime.accepts_python(version):
            return candidate
    low, high = runtime.python
    here, least, most = version_text(running), version_text(low), version_text(high)
    word = "new" if running > high else "old"
    raise UserError(
        f"Python {here} is too {word} for {runtime.title} (needs {least} to {most}) and no other was found",
        f"Install uv, which fetches one, or Python {most}, and run: sparsedeploy runtime install {runtime.name} "
        f"--python /path/to/python{most}.",
    )


def named_python(runtime: Runtime, python: str) -> Path:
    found = shutil.which(os.path.expanduser(python))
    version = None if found is None else _version_of(Path(found))
    if found is None or version is None:
        raise UserError(
            f"{python} is not a working Python interpreter",
            "Give the path of an interpreter, such as /usr/bin/python3.11.",
        )
    if not runtime.accepts_python(version):
        low, high = runtime.python
        word = "new" if version > high else "old"
        raise UserError(
            f"Python {version_text(version)} at {python} is too {word} for {runtime.title} "
            f"(needs {version_text(low)} to {version_text(high)})",
            f"Give another: --python /path/to/python{version_text(high)}.",
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


def version_text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
