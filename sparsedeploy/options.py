"""Options: a frozen dataclass is the only place where a name, its type, default, bounds and help stand.

The command line, the recipes, the manifest's request, ``--help`` and the tables of the documentation are derived from
it. :mod:`sparsedeploy.conversion` turns plain values into the declared types and back.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sparsedeploy.errors import UserError

T = TypeVar("T")
_LARGEST_SEED = 2**32 - 1
REQUIRED: Any = dataclasses.MISSING


@dataclass(frozen=True)
class Facts:
    """What :func:`option` declares beside type and default.

    Attributes:
        help: one or two sentences; ``{choices}`` stands for the names of ``choices``.
        unset: what None, or nothing, stands for, where that has to be explained.
        flag, short: on the command line; by default ``--`` and the name.
        choices: the names that are known, asked for when they are shown.
        replaces: options of a recipe that do not count when this one is typed.
        only_with: another option without which this one has no effect.
        repeated: whether several values are given one by one; else they may also stand together, between commas.
        recorded: whether a manifest's request keeps it; not so for what changes speed and memory only.
        reads: whether it may name a file or folder that is read; of NAME=VALUE pairs, the names that may. A path
            needs no such mark.
        writes: whether it names a file that is written.
    """

    help: str = ""
    unset: str = ""
    flag: str | None = None
    short: str | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: Callable[[], Sequence[str]] | None = None
    replaces: tuple[str, ...] = ()
    only_with: str | None = None
    repeated: bool = False
    recorded: bool = True
    reads: bool | tuple[str, ...] = False
    writes: bool = False

    @property
    def text(self) -> str:
        """The help with its choices, and what it means to leave the option out."""
        text = self.help
        if self.choices is not None and "{choices}" in text:
            text = text.replace("{choices}", one_of(self.choices()))
        return f"{text.removesuffix('.')} [default: {self.unset}]." if self.unset else text


def option(
    default: T = REQUIRED,
    help: str = "",
    *,
    unset: str = "",
    flag: str | None = None,
    short: str | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Callable[[], Sequence[str]] | None = None,
    replaces: tuple[str, ...] = (),
    only_with: str | None = None,
    repeated: bool = False,
    recorded: bool = True,
    reads: bool | tuple[str, ...] = False,
    writes: bool = False,
) -> T:
    """A field of an options dataclass, with its :class:`Facts`; without a default it must be given."""
    facts = Facts(
        help,
        unset,
        flag,
        short,
        at_least,
        above,
        at_most,
        below,
        choices,
        replaces,
        only_with,
        repeated,
        recorded,
        reads,
        writes,
    )
    return field(default=default, metadata={"facts": facts})


def like(owner: type[Any], name: str, default: Any = REQUIRED, **changed: Any) -> Any:
    """A field that is defined as another dataclass's option: its flags, bounds, choices and help.

    What ties an option to others of its own dataclass (``only_with``, ``replaces``) stays there.

    Args:
        default: in place of the other's; ``unset`` then goes too.
        changed: facts in place of the other's.
    """
    item = next(each for each in dataclasses.fields(owner) if each.name == name)
    facts: Facts = item.metadata["facts"]
    changed = {"flag": facts.flag or _flag_of(name), "only_with": None, "replaces": (), **changed}
    if default is not REQUIRED:
        changed.setdefault("unset", "")
    facts = dataclasses.replace(facts, **changed)
    return field(default=item.default if default is REQUIRED else default, metadata={"facts": facts})


def seed_option(help: str, *, flag: str | None = None, only_with: str | None = None) -> int:
    """The field of a seed."""
    return option(0, help, flag=flag, at_least=0, at_most=_LARGEST_SEED, only_with=only_with)


def one_of(names: Sequence[str]) -> str:
    """``a, b or c``."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


class Options:
    """Base of the options dataclasses: values are within their bounds, however they are made.

    Raises:
        UserError: a value out of its bounds; ValueError is for what does not go together.
    """

    def __post_init__(self) -> None:
        for item in described(type(self)):
            given = getattr(self, item.name)
            for value in given if isinstance(given, tuple) else (given,):
                if reason := out_of_bounds(value, item.facts):
                    raise UserError(f"{item.name} is {value}", f"It takes {reason}.")


@dataclass(frozen=True)
class Described:
    """One option: its field with the resolved type."""

    name: str
    hint: Any
    default: Any
    facts: Facts

    @property
    def arms(self) -> tuple[Any, ...]:
        """The types that it may have, without None."""
        return arms(self.hint)

    @property
    def kind(self) -> Any:
        """Its type without None; the origin of a generic one."""
        return typing.get_origin(self.arms[0]) or self.arms[0]

    @property
    def values(self) -> tuple[Any, ...]:
        """The values of a literal type."""
        return typing.get_args(self.arms[0]) if self.kind is typing.Literal else ()

    @property
    def flag(self) -> str:
        """Its long flag."""
        return self.facts.flag or _flag_of(self.name)

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is REQUIRED and not self.section

    @property
    def section(self) -> bool:
        """Whether it holds options itself."""
        return dataclasses.is_dataclass(self.arms[0])


def _flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def arms(hint: Any) -> tuple[Any, ...]:
    """The members of a union without None; otherwise the type itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(arm for arm in typing.get_args(hint) if arm is not type(None))
    return (hint,)


def described(options: type[Any]) -> list[Described]:
    """The options of a dataclass, in order; those of plain fields have no facts."""
    hints = typing.get_type_hints(options)
    return [
        Described(each.name, hints[each.name], each.default, each.metadata.get("facts", Facts()))
        for each in dataclasses.fields(options)
    ]


def out_of_bounds(value: Any, facts: Facts) -> str | None:
    """What a value should have been; None for one within its bounds, and for what has none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    bounds = [
        (facts.at_least, "at least", lambda bound: value >= bound),
        (facts.above, "above", lambda bound: value > bound),
        (facts.at_most, "at most", lambda bound: value <= bound),
        (facts.below, "below", lambda bound: value < bound),
    ]
    given = [(f"{words} {bound:.12g}", holds(bound)) for bound, words, holds in bounds if bound is not None]
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        finite = False
    if finite and all(holds for _, holds in given):
        return None
    kind = "a whole number" if isinstance(value, int) and finite else "a finite number"
    return f"{kind} of {' and '.join(words for words, _ in given)}".replace("of above", "above") if given else kind
