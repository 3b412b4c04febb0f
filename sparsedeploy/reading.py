"""Read files that anyone may have written: regular files of bounded size, UTF-8 text, and JSON with checked types.

Every refusal is a :class:`UserError` that names the file and, in JSON, the key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import stat
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from sparsedeploy.errors import UserError

HASH = "sha256"  # the key of a file for the hash of its other values
JSON_LIMIT = 1 << 28  # bytes; the largest published weight index has about 10 MB
DEPTH_LIMIT = 100  # levels of lists and objects in each other
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
SOUND_COPY = "Get an intact copy of the model."
_MISSING: Any = object()
T = TypeVar("T")


def open_regular(path: Path, *, fix: str) -> BinaryIO:
    """Open a regular file (or a link to one) for reading; never waits for a pipe or reads a device.

    Raises:
        UserError: nothing there, a folder, pipe or device, or a file that may not be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}", fix) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device"
        raise UserError(f"{path} is {what}, not a file", fix)
    return open(descriptor, "rb")


def read_bytes(path: Path, *, limit: int = JSON_LIMIT, fix: str) -> bytes:
    """A whole regular file.

    Raises:
        UserError: see :func:`open_regular`; also more than ``limit`` bytes, or a failing disk.
    """
    with open_regular(path, fix=fix) as file:
        try:
            content = file.read(limit + 1) or b""
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}", fix) from error
    if len(content) > limit:
        raise UserError(f"{path} is larger than {limit / 1e6:,.0f} MB, too large for such a file", fix)
    return content


def read_text(path: Path, *, limit: int = JSON_LIMIT, fix: str) -> str:
    r"""A UTF-8 text, without a byte order mark at its start; lines end with ``\n`` (also where ``\r\n`` was stored).

    Raises:
        UserError: see :func:`read_bytes`; also another encoding, naming the first bad byte.
    """
    content = read_bytes(path, limit=limit, fix=fix)
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})", fix) from error


def parse_json(text: str | bytes, where: str, *, fix: str) -> Any:
    """Parse one JSON text.

    Args:
        where: names the file (and line) in errors.

    Raises:
        UserError: not UTF-8, a byte order mark, not JSON, nested too deep, a key twice in one object, a number with
            thousands of digits, or half a surrogate pair in a string.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for at, name in enumerate(names) if name in names[:at])
            raise UserError(f"{where} has the key '{twice[:80]}' twice in one object", fix)
        return values

    try:
        decoded = text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not JSON in UTF-8 (byte {error.start})", fix) from error
    if decoded.startswith("\ufeff"):
        raise UserError(f"{where} starts with a byte order mark", "Save it as UTF-8 without one.")
    try:
        value = json.loads(decoded, object_pairs_hook=unique)
    except RecursionError as error:
        raise UserError(f"{where} is nested deeper than {DEPTH_LIMIT} levels", fix) from error
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON ({str(error)[:160]})", fix) from error
    if decoded.count("[") + decoded.count("{") > DEPTH_LIMIT and _deeper(value, DEPTH_LIMIT):
        raise UserError(f"{where} is nested deeper than {DEPTH_LIMIT} levels", fix)
    if "\\ud" in decoded or "\\uD" in decoded:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where} has half a surrogate pair in a string", fix) from error
    return value


def parse_object(text: str | bytes, where: str, *, fix: str) -> dict[str, Any]:
    """Parse a JSON text that must be an object.

    Raises:
        UserError: see :func:`parse_json`; also a list, string, number or null.
    """
    value = parse_json(text, where, fix=fix)
    if not isinstance(value, dict):
        raise UserError(f"{where} is {kind_of(value)}, not a JSON object", fix)
    return value


def read_object(path: Path, *, limit: int = JSON_LIMIT, fix: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: see :func:`read_bytes` and :func:`parse_object`.
    """
    return parse_object(read_bytes(path, limit=limit, fix=fix), str(path), fix=fix)


def contained(folder: Path, name: str, where: str) -> Path:
    """The path of a file that a listing (an index, a manifest, an artifact's description) names.

    It must lie in the listing's folder. In a hub snapshot a link into the repository's own blobs counts as inside.

    Args:
        where: the listing, for errors.

    Raises:
        UserError: an absolute name, one with ``..``, or a link that leads out of the folder.
    """
    fix = "List only files inside the folder."
    if not name or "\0" in name or "\\" in name or name.startswith("/") or ".." in name.split("/"):
        raise UserError(f"{where} names {name[:200]!r}, which is not a name inside its folder", fix)
    path = folder / name
    if not inside(folder, path):
        raise UserError(f"{where} names {name}, which is a link out of its folder", "Put the file itself there.")
    return path


def inside(folder: Path, path: Path) -> bool:
    """Whether a path, links followed, lies in the folder; for a hub snapshot also in the repository's blobs."""
    try:
        root, real = folder.resolve(), path.resolve()
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        return False
    blobs = root.parent.parent / "blobs"
    return real.is_relative_to(root) or (root.parent.name == "snapshots" and real.is_relative_to(blobs))


def hashed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a JSON file and their SHA-256 under the key HASH, which :func:`take_hash` compares.

    The order of the keys and the layout of the file do not count.
    """
    return {**values, HASH: hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}


def take_hash(values: dict[str, Any], path: Path, *, fix: str) -> None:
    """Take the hash out of the values of the file ``path``.

    Raises:
        UserError: it is missing or not that of the values.
    """
    found = values.pop(HASH, None)
    if found != hashed(values)[HASH]:
        raise UserError(f"{path} was edited or is damaged (its SHA-256 differs)", fix)


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    return _KINDS.get(type(value), "a number")


class Fields:
    """Typed access to the fields of a JSON object; every error names the file and the key.

    Args:
        values: the object.
        where: names the file (and the place in it) in errors.
        fix: what to do about a bad file.
    """

    def __init__(self, values: Mapping[str, Any], where: str, fix: str) -> None:
        self.values = values
        self.where = where
        self.fix = fix

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def text(self, key: str, default: Any = _MISSING) -> str:
        """A string.

        Raises:
            UserError: another type, or missing without a default; the same holds for all getters.
        """
        return self._typed(key, (str,), "a string", default)

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        """True or false."""
        return self._typed(key, (bool,), "true or false", default)

    def integer(self, key: str, default: Any = _MISSING, *, minimum: int = 0, maximum: int = 2**63 - 1) -> int:
        """An integer in a range; ``true`` is none."""
        value = self._typed(key, (int,), "an integer", default)
        if isinstance(value, int) and not minimum <= value <= maximum:
            shown = str(value) if abs(value) < 10**20 else f"a number of about {value.bit_length()} bits"
            raise UserError(f"{self.where}: '{key}' is {shown}, not from {minimum} to {maximum}", self.fix)
        return value

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A finite number."""
        value = self._typed(key, (int, float), "a number", default)
        try:
            finite = value is None or math.isfinite(value)
        except OverflowError:
            finite = False
        if not finite:
            raise UserError(f"{self.where}: '{key}' is not a finite number", self.fix)
        return value

    def mapping(self, key: str, default: Any = _MISSING) -> dict[str, Any]:
        """An object, as plain data."""
        return self._typed(key, (dict,), "an object", default)

    def items(self, key: str, default: Any = _MISSING) -> list[Any]:
        """A list, as plain data."""
        return self._typed(key, (list,), "a list", default)

    def fields(self, key: str) -> Fields:
        """An object, with typed access."""
        return Fields(self.mapping(key), f"{self.where}: {key}", self.fix)

    def each(self, key: str) -> Iterator[Fields]:
        """The objects in a list."""
        for at, value in enumerate(self.items(key)):
            if not isinstance(value, dict):
                raise UserError(f"{self.where}: '{key}' entry {at} is {kind_of(value)}, not an object", self.fix)
            yield Fields(value, f"{self.where}: {key} entry {at}", self.fix)

    def build(self, kind: type[T]) -> T:
        """A dataclass from the fields of its names, by its annotations; other keys are left alone."""
        hints = typing.get_type_hints(kind)
        values = {}
        for each in dataclasses.fields(kind):  # type: ignore[arg-type]
            if each.default is not dataclasses.MISSING and each.name not in self.values:
                continue
            values[each.name] = self._of(each.name, hints[each.name])
        return kind(**values)

    def _of(self, key: str, hint: Any) -> Any:
        if isinstance(hint, types.UnionType):  # X | None
            if key in self.values and self.values[key] is None:
                return None
            hint = next(each for each in hint.__args__ if each is not type(None))
        if dataclasses.is_dataclass(hint):
            return self.fields(key).build(typing.cast("type[Any]", hint))
        if typing.get_origin(hint) is dict:
            values = self.mapping(key)
            inner = Fields(values, f"{self.where}: {key}", self.fix)
            return {name: inner._of(name, typing.get_args(hint)[1]) for name in values}
        getters: dict[Any, Callable[[str], Any]] = {
            str: self.text,
            int: self.integer,
            float: self.number,
            bool: self.flag,
        }
        return getters[hint](key)

    def _typed(self, key: str, kinds: tuple[type, ...], wanted: str, default: Any) -> Any:
        value = self.values.get(key, _MISSING)
        if value is _MISSING:
            if default is _MISSING:
                raise UserError(f"{self.where} lacks '{key}'", self.fix)
            return default
        if value is None and default is None:
            return None
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(f"{self.where}: '{key}' is {kind_of(value)}, not {wanted}", self.fix)
        return value


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects stand in each other more than ``levels`` deep."""
    layer = [value]
    for _ in range(levels + 1):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not layer:
            return False
    return True
