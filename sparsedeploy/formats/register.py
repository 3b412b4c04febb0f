"""Make transformers read packed checkpoints, without importing it.

transformers has registries for quantisation methods but no entry point that fills them, so someone has to call them
after it is imported. Importing it here would cost every ``sparsedeploy`` command seconds. Instead, a finder waits for
the import of the module that holds the registries and adds the method right after it has run.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRIES = "transformers.quantizers.auto"
_METHOD = "sparsedeploy.formats.hf"


def register_with_transformers() -> None:
    """Register the packed format now if transformers' registries are loaded, else as soon as they are."""
    if _REGISTRIES in sys.modules:
        importlib.import_module(_METHOD)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Imports the method, which registers itself, once the registries are there, and takes itself out of the way."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRIES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(_METHOD)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
