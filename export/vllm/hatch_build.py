"""Build hook of the wheel: put the CPU kernel in, compiled for every instruction set, where a compiler is at hand.

Without one the wheel holds only the source, and the kernel is compiled at first use. The compiled kernel knows neither
Python nor torch: such a wheel is for one platform but for every Python.
"""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PACKAGE = Path(__file__).resolve().parent / "sparsedeploy_vllm"


class KernelHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or version == "editable":
            return
        # Loaded by its path: the package itself needs torch, which a build does not have.
        specification = importlib.util.spec_from_file_location("compilation", _PACKAGE / "compilation.py")
        assert specification is not None
        assert specification.loader is not None
        compilation = importlib.util.module_from_spec(specification)
        # Dataclasses look their module up by name.
        sys.modules["compilation"] = compilation
        specification.loader.exec_module(compilation)
        if compilation.find_compiler() is None or platform.machine() != "x86_64" or platform.system() != "Linux":
            return
        folder = Path(self.directory) / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        for level in compilation.LEVELS:
            library = folder / f"{level.name}-{platform.machine()}.so"
            try:
                compilation.compile_library(level, library)
            except (OSError, subprocess.SubprocessError) as error:
                self.app.display_warning(f"the {level.name} kernel was not compiled: {error}")
                continue
            build_data["force_include"][str(library)] = f"sparsedeploy_vllm/prebuilt/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
