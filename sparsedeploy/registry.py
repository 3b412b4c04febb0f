"""Methods register themselves by name; everything that lists methods reads these registries.

A method is a function plus a frozen dataclass of options, in one file that is named as the user types it (``_`` stands
for ``-``). Adding one means adding that file: a file belongs to a registry when it has a line such as
``@PRUNERS.register("wanda", ...)``, so names are known without importing anything, and a method's module is imported
when the method is asked for. Other distributions add theirs by the entry-point group ``sparsedeploy.methods``, whose
entries are called ``REGISTRY.METHOD``, such as ``PRUNERS.column``, and name a module.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from sparsedeploy.conversion import build_options
from sparsedeploy.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])
ENTRY_POINTS = "sparsedeploy.methods"
_REGISTRATION = re.compile(r"^@([A-Z]+)\.register\(", re.MULTILINE)


@dataclass(frozen=True)
class Method(Generic[F]):
    """One registered method.

    Attributes:
        name: what the user types.
        function: what runs.
        options: the frozen dataclass that holds its options, all with defaults.
        summary: the first line of the function's docstring.
        traits: facts that callers need before running it, such as which statistics it reads.
    """

    name: str
    function: F
    options: type[Any]
    summary: str
    traits: Mapping[str, Any]

    def make_options(self, values: Mapping[str, Any] | None = None) -> Any:
        """Build the options from plain values (strings are converted to the field's type).

        Raises:
            UserError: an unknown option, or a value that does not fit.
        """
        return build_options(self.name, self.options, values or {})


class Registry(Generic[F]):
    """Name -> method; the methods of files that are not imported yet are known by name alone.

    Args:
        variable: what the registry is called in the files that register with it.
        kind: what a method is, in messages.
        package: where its own methods are.
    """

    def __init__(self, variable: str, kind: str, package: str | None = None) -> None:
        self.variable = variable
        self.kind = kind
        self._methods: dict[str, Method[F]] = {}
        self._found: dict[str, Callable[[], Any]] = {}
        self._package = package

    def register(self, name: str, options: type[Any], **traits: Any) -> Callable[[F], F]:
        """Decorator: register a function under ``name`` with its options dataclass."""

        def decorate(function: F) -> F:
            if name in self._methods:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            summary = (function.__doc__ or "").strip().split("\n")[0]
            self._methods[name] = Method(name, function, options, summary, traits)
            return function

        return decorate

    def get(self, name: str) -> Method[F]:
        """The method of that name.

        Raises:
            UserError: no such method, or its module cannot be imported.
        """
        if name not in self._methods and name in self._known():
            try:
                self._found[name]()
            except ImportError as error:
                raise UserError(
                    f"{self.kind} '{name}' cannot be imported ({error})", "Install what it needs."
                ) from error
            if name not in self._methods:
                raise ValueError(f"the file of {self.kind} '{name}' registers another name")
        if name not in self._methods:
            raise UserError(f"unknown {self.kind} '{name}'", f"Known: {', '.join(self.names())}.")
        return self._methods[name]

    def names(self) -> list[str]:
        """Sorted; imports nothing."""
        return sorted({*self._methods, *self._known()})

    def add(self, name: str, load: Callable[[], Any]) -> None:
        """Make a name known whose method is registered by calling ``load``."""
        self._found.setdefault(name, load)

    def __iter__(self) -> Iterator[Method[F]]:
        return (self.get(name) for name in self.names())

    def _known(self) -> dict[str, Callable[[], Any]]:
        if self._package is not None:
            package, self._package = self._package, None
            discover(package)
            for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
                variable, _, name = entry.name.partition(".")
                if variable == self.variable:
                    self.add(name, entry.load)
        return self._found


def discover(package: str | Path) -> list[str]:
    """Make the methods known whose files are in a package (its dotted name) or in a folder; returns their names.

    Nothing is imported before a method is asked for; of a package, only those that contain it.
    """
    if isinstance(package, Path):
        folders = [package]
    else:
        spec = importlib.util.find_spec(package)
        folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    names = []
    for path in sorted(file for folder in folders for file in folder.glob("*.py")):
        name = path.stem.replace("_", "-")
        for variable in sorted(set(_REGISTRATION.findall(path.read_text(encoding="utf-8")))):
            if variable in REGISTRIES:
                REGISTRIES[variable].add(name, _loader(package, path))
                names.append(name)
    return names


def _loader(package: str | Path, path: Path) -> Callable[[], Any]:
    if not isinstance(package, Path):
        return lambda: importlib.import_module(f"{package}.{path.stem}")

    def load() -> Any:
        spec = importlib.util.spec_from_file_location(f"sparsedeploy_method_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


# What each function takes and gives stands in the packages' own modules: this floor knows none of their types.
ALLOCATORS: Registry[Callable[[Any], Any]] = Registry("ALLOCATORS", "allocation method", "sparsedeploy.allocation")
PRUNERS: Registry[Callable[..., Any]] = Registry("PRUNERS", "pruning method", "sparsedeploy.pruning")
RECOVERIES: Registry[Callable[[Any, Any], Any]] = Registry("RECOVERIES", "recovery method", "sparsedeploy.recovery")
TARGETS: Registry[Callable[..., Any]] = Registry("TARGETS", "export target", "sparsedeploy.targets")
REGISTRIES: Mapping[str, Registry[Any]] = {each.variable: each for each in (ALLOCATORS, PRUNERS, RECOVERIES, TARGETS)}
