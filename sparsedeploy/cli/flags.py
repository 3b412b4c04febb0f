"""Flags from options: a command takes the options of dataclasses, and what is typed and never read is refused."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from sparsedeploy.cli.completion import offers
from sparsedeploy.conversion import convert, parse_pairs
from sparsedeploy.errors import UserError
from sparsedeploy.options import Described, described

T = TypeVar("T")
Target = tuple[str, str]  # (section, option)


@dataclass(frozen=True)
class Section:
    """Options that a command takes.

    Attributes:
        name: of the section, as in a recipe.
        panel: where the help shows its flags; None is the main one.
        flags: option -> flags in place of its own.
        without: options that the command does not take.
        undecided: options whose default is not shown, because the command has another; True for all.
    """

    name: str
    options: type[Any]
    panel: str | None = None
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    undecided: tuple[str, ...] | bool = ()

    def items(self) -> list[Described]:
        """What can be typed, inherited options last; not the options that hold options themselves."""
        items = [item for item in described(self.options) if not item.section and item.name not in self.without]
        return sorted(items, key=lambda item: item.name not in vars(self.options)["__annotations__"])

    def declared(self, item: Described) -> tuple[str, ...]:
        """The flags of an option, the long one first."""
        own = (item.flag, item.facts.short)
        return self.flags.get(item.name, tuple(flag for flag in own if flag))

    def default(self, item: Described) -> Any:
        """The default to show."""
        hidden = self.undecided is True or (self.undecided and item.name in self.undecided)
        if item.required:
            return inspect.Parameter.empty
        if isinstance(item.default, tuple) and not hidden:
            return [str(value) for value in item.default] or None
        return None if hidden or item.default == "" else item.default


class Given:
    """The options that a command was given: what was typed, over a recipe.

    Args:
        typed: (section, option) -> converted value.
        flags: (section, option) -> the flag that was typed.
        replaced: (section, option) -> options of the same section whose recipe values it replaces.
        taken: the flags that have been read.
    """

    def __init__(
        self,
        typed: Mapping[Target, Any],
        flags: Mapping[Target, str],
        replaced: Mapping[Target, tuple[str, ...]] | None = None,
        recipe: Mapping[str, Mapping[str, Any]] | None = None,
        taken: Iterable[str] = (),
    ) -> None:
        self._typed = dict(typed)
        self._flags = dict(flags)
        self._replaced = dict(replaced or {})
        self._recipe = recipe or {}
        self._taken = set(taken)

    def over(self, recipe: Mapping[str, Mapping[str, Any]]) -> Given:
        """The same over a recipe's values."""
        return Given(self._typed, self._flags, self._replaced, recipe, self._taken)

    def value(self, section: str, name: str, default: Any = None) -> Any:
        """One value, without taking it."""
        return self._values(section).get(name, default)

    def names(self, section: str) -> list[str]:
        """The options that were given."""
        return list(self._values(section))

    def take(self, section: str, *, without: Iterable[str] = ()) -> dict[str, Any]:
        """The section's values that were given; they count as read."""
        values = {name: value for name, value in self._values(section).items() if name not in without}
        self._taken |= {flag for (place, name), flag in self._flags.items() if place == section and name in values}
        return values

    def build(self, section: str, options: type[T], *, without: Iterable[str] = ()) -> T:
        """The section's options; they count as read.

        Raises:
            UserError: naming flags that have no effect without another one.
        """
        values = self.take(section, without=without)
        known = {item.name: item for item in described(options)}
        idle: dict[str, list[str]] = {}
        for name in values:
            needed = known[name].facts.only_with
            if needed and (section, name) in self._flags and not values.get(needed, known[needed].default):
                idle.setdefault(known[needed].flag, []).append(self._flags[section, name])
        for needed, flags in idle.items():
            has, leave = _no_effect(flags)
            raise UserError(f"{has} without {needed}", f"{leave}, or add {needed}.")
        return options(**values)

    def refuse_unread(self, why: Mapping[str, str]) -> None:
        """Refuse what was typed and has not been taken.

        Args:
            why: section -> the reason.

        Raises:
            UserError: naming the flags.
        """
        for section in dict.fromkeys(place for place, _ in self._typed):
            flags = [flag for (place, _), flag in self._flags.items() if place == section and flag not in self._taken]
            if flags:
                has, leave = _no_effect(flags)
                raise UserError(f"{has}: {why.get(section, 'nothing here reads it')}", f"{leave}.")

    def _values(self, section: str) -> dict[str, Any]:
        typed = {name: value for (place, name), value in self._typed.items() if place == section}
        replaced = {name for key in typed for name in self._replaced.get((section, key), ())}
        values = {name: value for name, value in self._recipe.get(section, {}).items() if name not in replaced}
        for name, value in typed.items():
            before = values.get(name)
            values[name] = {**before, **value} if isinstance(value, dict) and isinstance(before, Mapping) else value
        return values


def _is_typed(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name != "DEFAULT"


@dataclass
class _Flag:
    parameter: str
    declared: tuple[str, ...]
    item: Described
    panel: str | None
    default: Any
    targets: list[tuple[Section, Described]] = field(default_factory=list)

    def declare(self) -> inspect.Parameter:
        """The parameter that stands for it in the command's signature."""
        values = self.item.values
        long, *short = self.declared
        option = typer.Option(
            f"{long}/--no-{long[2:]}" if self.item.default is True else long,
            *short,
            help=self.item.facts.text,
            rich_help_panel=self.panel,
            metavar="|".join(map(str, values)) or _metavar(self.item),
            autocompletion=offers(self.item.facts.choices or (lambda: values)),
        )
        hint = typing.cast(Any, Annotated)[_typed_as(self.item), option]
        return inspect.Parameter(self.parameter, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=hint)


def _no_effect(flags: list[str]) -> tuple[str, str]:
    """What is wrong with flags that nothing reads, and how to fix it."""
    if len(flags) == 1:
        return f"{flags[0]} has no effect", "Leave it out"
    return f"{', '.join(flags[:-1])} and {flags[-1]} have no effect", "Leave them out"


def takes(*sections: Section) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: where the command's parameter ``given`` stands, its flags stand on the command line."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        flags = _flags(sections)
        hints = typing.get_type_hints(command, include_extras=True)
        parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
        for name, parameter in inspect.signature(command).parameters.items():
            if name == "given":
                parameters += [flag.declare() for flag in flags]
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))

        @functools.wraps(command)
        def run(**values: Any) -> None:
            context: typer.Context = values.pop("context")
            given = [(flag, values.pop(flag.parameter)) for flag in flags]
            command(given=_given(given, context), **values)

        run.flags = {flag.parameter: flag.item for flag in flags}  # type: ignore[attr-defined]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _flags(sections: Iterable[Section]) -> list[_Flag]:
    """One for each flag; sections that name the same one share it."""
    flags: dict[str, _Flag] = {}
    for section in sections:
        for item in section.items():
            declared = section.declared(item)
            new = _Flag(f"{section.name}_{item.name}", declared, item, section.panel, section.default(item))
            flags.setdefault(declared[0], new).targets.append((section, item))
    return list(flags.values())


def _given(flags: Iterable[tuple[_Flag, Any]], context: typer.Context) -> Given:
    typed: dict[Target, Any] = {}
    names: dict[Target, str] = {}
    replaced: dict[Target, tuple[str, ...]] = {}
    for flag, value in flags:
        if not _is_typed(context, flag.parameter):
            continue
        plain = parse_pairs(value) if flag.item.kind is Mapping else value
        for section, item in flag.targets:
            target = (section.name, item.name)
            typed[target] = convert(flag.declared[0], plain, item.hint, item.facts)
            names[target] = flag.declared[0]
            replaced[target] = item.facts.replaces
    return Given(typed, names, replaced)


def _typed_as(item: Described) -> Any:
    """The type that the command line reads for an option."""
    kind = item.kind
    if kind is tuple and ... not in typing.get_args(item.arms[0]):
        return item.hint
    if kind in (Mapping, tuple):
        return list[str] | None
    plain = kind if kind in (bool, Path) else str  # numbers too: one converter says what is wrong with them
    return plain if item.required or (item.default is not None and plain is bool) else plain | None


def _metavar(item: Described) -> str | None:
    """What stands for the value of an option; None for a switch, and where the type of the command line says it."""
    words = {int: "INT", float: "NUMBER", Path: "PATH"}
    if item.kind is Mapping:
        return "NAME=VALUE"
    if item.kind is not tuple:
        return words.get(item.kind)
    if ... not in typing.get_args(item.arms[0]):
        return None
    word = words.get(typing.get_args(item.arms[0])[0], "TEXT")
    return word if item.facts.repeated else f"{word},..."
