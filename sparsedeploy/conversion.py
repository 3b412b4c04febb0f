"""One converter for every option: plain values, of a command line, of YAML or JSON, become the declared types.

And back: as JSON has them, or as the words of a command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sparsedeploy.errors import UserError
from sparsedeploy.options import Facts, arms, described, one_of, out_of_bounds

T = TypeVar("T")
_LARGEST = 2**63 - 1
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def build_options(owner: str, options: type[T], values: Mapping[str, Any]) -> T:
    """Build an options dataclass from plain values; ``owner`` names it in messages.

    Raises:
        UserError: an unknown option, a value that does not fit, or one that has no effect.
    """
    converted = convert_options(owner, options, values)
    try:
        built = options(**converted)
    except ValueError as error:
        raise UserError(f"{owner}: {error}", "Change that option.") from None
    for item in described(options):
        needed = item.facts.only_with
        if needed and not getattr(built, needed) and converted.get(item.name, item.default) != item.default:
            raise UserError(f"{owner}: option {item.name} has no effect without {needed}", "Leave it out, or set both.")
    return built


def convert_options(
    owner: str, options: type[Any], values: Mapping[str, Any], labels: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Convert plain values to the types that the dataclass declares; those left out stay out.

    Args:
        labels: how a message names an option that is not called ``owner: option NAME``, such as by its flag.

    Raises:
        UserError: an unknown option, or a value that does not fit.
    """
    known = {
        item.name: item
        for item in described(options)
        if not item.section or values.get(item.name) is None or isinstance(values[item.name], item.arms[0])
    }
    converted: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"Did you mean {close[0]}? " if close else ""
            raise UserError(
                f"{owner} has no option {shown(key)}", f"{hint}Its options: {', '.join(sorted(known)) or 'none'}."
            )
        label = (labels or {}).get(key, f"{owner}: option {key}")
        converted[key] = convert(label, value, known[key].hint, known[key].facts)
    return converted


def convert(label: str, value: Any, hint: Any, facts: Facts = Facts()) -> Any:
    """Convert one plain value to a type and check its bounds.

    Args:
        label: names the option in messages.
        hint: bool, int, float, str, Path, a literal, a mapping, a tuple of any number or of two of these, an options
            dataclass, or one of them or None.

    Raises:
        UserError: a value that does not fit.
    """
    kinds = arms(hint)
    if kinds != (hint,) and (value is None or value == "none"):
        return None
    kind = kinds[0]
    origin = typing.get_origin(kind) or kind
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if not isinstance(value, Mapping):
            raise UserError(f"{label} is {shown(value)}", f"It takes {_wanted(kind)}.")
        return build_options(label, kind, value)
    if origin is tuple:
        inner, more = typing.get_args(kind)
        if not isinstance(value, (str, list, tuple)) or (more is not ... and len(value) != 2):
            raise UserError(f"{label} is {shown(value)}", f"It takes {_wanted(kind)}.")
        whole = facts.repeated or more is not ...
        parts = [
            part
            for each in ([value] if isinstance(value, str) else value)
            for part in (map(str.strip, each.split(",")) if isinstance(each, str) and not whole else [each])
        ]
        return tuple(convert(label, part, inner, facts) for part in parts if part != "")
    try:
        converted = _CONVERTERS[origin](value, kind)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(f"{label} is {shown(value)}", f"It takes {_wanted(kind)}.") from None
    if reason := out_of_bounds(converted, facts):
        raise UserError(f"{label} is {shown(value)}", f"It takes {reason}.")
    return converted


def shown(value: Any) -> str:
    """A value in a message: short, whatever it is."""
    if isinstance(value, (dict, list, set)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'}"
    try:
        text = repr(value) if isinstance(value, str) else str(value).lower() if value is None else str(value)
    except ValueError:  # thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def plain_options(options: Any) -> dict[str, Any]:
    """The values of an options dataclass as JSON has them; :func:`build_options` reads them back."""
    return {each.name: _plain(getattr(options, each.name)) for each in dataclasses.fields(options)}


def typed_words(options: type[Any], values: Mapping[str, Any], **flags: str) -> list[str]:
    """The words of a command line that give these values; those that are missing, or the default, are left out.

    Args:
        flags: option -> the flag in place of its own.
    """
    words: list[str] = []
    for item in described(options):
        flag = flags.get(item.name, item.flag)
        value = values.get(item.name, item.default)
        given = tuple(value) if isinstance(value, (list, tuple)) else value
        if item.section or value is None or given in (item.default, ()):
            continue
        if isinstance(value, Mapping):
            words += [word for name, part in value.items() for word in (flag, f"{name}={part}")]
        elif isinstance(given, tuple) and item.facts.repeated:
            words += [word for part in given for word in (flag, str(part))]
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, ",".join(map(str, given)) if isinstance(given, tuple) else f"{value}"]
    return words


def parse_pairs(pairs: Sequence[str]) -> dict[str, str]:
    """Turn ``["strength=0.1", "m=5"]`` into a mapping.

    Raises:
        UserError: an item without ``=``, or a name twice.
    """
    values: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not separator or not key:
            raise UserError(f"option '{pair}' is not NAME=VALUE", "Write it as, for example, strength=0.1.")
        if key in values:
            raise UserError(f"option {key} is given twice", "Give it once.")
        values[key] = value.strip()
    return values


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return plain_options(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _to_bool(value: Any, kind: Any) -> bool:
    return value if isinstance(value, bool) else _TRUTH[value.lower()] if isinstance(value, str) else _refuse()


def _to_int(value: Any, kind: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        _refuse()
    number = int(value)
    exact = isinstance(value, str) or number == value
    return number if exact and abs(number) <= _LARGEST else _refuse()


def _to_float(value: Any, kind: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        _refuse()
    number = float(value)
    return number if math.isfinite(number) else _refuse()


def _to_str(value: Any, kind: Any) -> str:
    return value if isinstance(value, str) else _refuse()


def _to_path(value: Any, kind: Any) -> Path:
    return Path(value) if isinstance(value, (str, Path)) and str(value) else _refuse()


def _to_literal(value: Any, kind: Any) -> Any:
    return value if any(value == arm and type(value) is type(arm) for arm in typing.get_args(kind)) else _refuse()


def _to_mapping(value: Any, kind: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) and all(isinstance(key, str) for key in value) else _refuse()


def _refuse() -> Any:
    raise ValueError


_CONVERTERS: dict[Any, Callable[[Any, Any], Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
    Path: _to_path,
    typing.Literal: _to_literal,
    Mapping: _to_mapping,
    dict: _to_mapping,
}
_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", Path: "a path"}


def _wanted(kind: Any) -> str:
    """The words for a type, in a message."""
    origin = typing.get_origin(kind) or kind
    if origin is typing.Literal:
        return one_of([str(value) for value in typing.get_args(kind)])
    if origin is tuple:
        inner, more = typing.get_args(kind)
        return f"{_wanted(inner)}, {'or several with commas between them' if more is ... else 'twice'}"
    return _WORDS.get(origin, "a mapping of names to values")
