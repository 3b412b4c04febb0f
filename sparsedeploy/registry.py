"""Methods register themselves by name; everything that lists methods reads these registries.

A method is a function plus a frozen dataclass of options. Adding one means adding one file with one decorator: the
command line, the plans, the documentation and the test matrix pick it up from here.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sparsedeploy.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])


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


def build_options(owner: str, options: type[Any], values: Mapping[str, Any]) -> Any:
    """Build an options dataclass from plain values; ``owner`` names it in messages.

    Raises:
        UserError: an unknown option, or a value that does not fit.
    """
    hints = typing.get_type_hints(options)
    known = {field.name: hints[field.name] for field in dataclasses.fields(options)}
    converted: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            names = ", ".join(sorted(known)) or "none"
            raise UserError(f"{owner} has no option '{key}'", f"Its options: {names}.")
        converted[key] = _convert(owner, key, value, known[key])
    try:
        return options(**converted)
    except ValueError as error:
        raise UserError(f"{owner}: {error}", "Change that option.") from None


def _convert(method: str, key: str, value: Any, hint: Any) -> Any:
    """Convert one plain value to the type that the options dataclass declares."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "none":
            return None
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
        origin = typing.get_origin(hint)
    try:
        if origin is typing.Literal:
            if value not in typing.get_args(hint):
                raise ValueError
            return value
        if hint is bool and isinstance(value, str):
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[value.lower()]
        if hint in (int, float, str, bool):
            if hint is int and isinstance(value, float) and value != int(value):
                raise ValueError
            return hint(value)
    except (ValueError, KeyError, TypeError):
        wanted = " or ".join(map(str, typing.get_args(hint))) if origin is typing.Literal else hint.__name__
        raise UserError(f"{method}: option {key} is '{value}'", f"It takes {wanted}.") from None
    return value


class Registry(Generic[F]):
    """Name -> method, in the order of registration."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._methods: dict[str, Method[F]] = {}

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
            UserError: no such method.
        """
        if name not in self._methods:
            raise UserError(f"unknown {self.kind} '{name}'", f"Known: {', '.join(self._methods)}.")
        return self._methods[name]

    def names(self) -> list[str]:
        """Sorted, whatever was imported first."""
        return sorted(self._methods)

    def __iter__(self) -> Iterator[Method[F]]:
        return (self._methods[name] for name in self.names())


def parse_options(pairs: list[str]) -> dict[str, str]:
    """Turn ``["strength=0.1", "m=5"]`` into a mapping.

    Raises:
        UserError: an item without ``=``.
    """
    values: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise UserError(f"option '{pair}' is not NAME=VALUE", "Write it as, for example, strength=0.1.")
        values[key.strip().replace("-", "_")] = value.strip()
    return values
