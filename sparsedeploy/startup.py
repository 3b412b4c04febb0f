"""A quick start for processes of our own, and what is done right after a package has been imported."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_ABOUT_PACKAGES = "transformers.utils"
_UNUSED = ("is_sklearn_available", "is_scipy_available")


def quick_start() -> None:
    """Leave out of a process what takes a third of its start; call it before torch and transformers are imported.

    Where scikit-learn and SciPy are installed, transformers imports them for assisted decoding and for the losses of
    image detectors, which nothing here uses. And Python looks through all objects for garbage each time that their
    number has grown by a quarter, while what imports make stays to the end: full collections become rare, the partial
    ones, which find what is short-lived, stay as they are. Both are for the main program to decide: not for libraries.
    """
    gc.set_threshold(700, 10, 1000)
    after_import(_ABOUT_PACKAGES, _leave_out)


def _leave_out(module: ModuleType) -> None:
    for name in _UNUSED:
        setattr(module, name, lambda: False)


def after_import(name: str, act: Callable[[ModuleType], object]) -> None:
    """Call a function with a module right after it has been imported; nothing happens where it is imported already."""
    if name not in sys.modules:
        sys.meta_path.insert(0, _AfterImport(name, act))


class _AfterImport(MetaPathFinder):
    """Finds one module as the others would, adds to what executes it, and takes itself out of the way."""

    def __init__(self, name: str, act: Callable[[ModuleType], object]) -> None:
        self.name = name
        self.act = act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader, execute = spec.loader, spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            loader.exec_module = execute  # type: ignore[method-assign]  # it may be of other modules too
            execute(module)
            self.act(module)

        loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
