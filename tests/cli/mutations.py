"""Hostile inputs by the dozen: every kind of damage to a JSON file, drawn with a seed.

The environment variable FUZZ_SEED, a number, draws others.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from sparsedeploy.errors import UserError

T = TypeVar("T")
# What stands where something else should: wrong types, huge, negative, empty, not finite, and strings that bite.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2.5, -0.0, 2**31, 2**63, 10**40, 1e308, float("nan"), float("inf")),
    *("", "x", "1", "../../etc/passwd", "/dev/zero", "a\nb", "\x1b[2J", "\u2028", "x" * 5000, "nan", "[/b]"),
    *([], [None], [1] * 50, {}, {"": None}, [[[[]]]]),
)
DELETE = object()
OTHERS = 1000 * int(os.environ.get("FUZZ_SEED", "0"))
# What stands in place of a whole file.
FILES: tuple[bytes, ...] = (
    *(b"", b" ", b"null", b"[]", b"3", b'"x"', b"true", b"NaN", b"{", b"{}", b"{}{}", b"\x00", b"\xff\xfe{}"),
    *(b"\xef\xbb\xbf{}", b'{"a": 1, "a": 2}', b"[" * 5000, b'{"a":' * 5000, b'{"a": "\\ud800"}', b"{'a': 1}"),
)

Path = tuple[str | int, ...]


def places(value: Any, above: Path = ()) -> Iterator[Path]:
    """The path of every value in nested objects and lists, of the first two entries of long ones."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items if len(items) < 60 else items[:2]:
        yield (*above, key)
        yield from places(inner, (*above, key))


def changed(value: Any, place: Path, new: Any) -> Any:
    """A copy with another value in one place, or without it."""
    result = copy.deepcopy(value)
    inner = result
    for key in place[:-1]:
        inner = inner[key]
    if new is DELETE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return result


def mutations(content: bytes, count: int, seed: int, skip: Callable[[Path], bool] = lambda place: False) -> list[bytes]:
    """Whole files that are wrong, then the file with one value changed or removed, drawn from all such changes."""
    value = json.loads(content)
    every = [(place, new) for place in places(value) if not skip(place) for new in (*VALUES, DELETE)]
    drawn = random.Random(seed + OTHERS).sample(every, min(count, len(every)))
    return [*FILES, *(json.dumps(changed(value, place, new)).encode() for place, new in drawn)]


def damaged_bytes(content: bytes, count: int, seed: int) -> list[bytes]:
    """The file cut short, lengthened, with bytes changed, removed, doubled or swapped."""
    generator = random.Random(seed + OTHERS)
    made = []
    for at in range(count):
        start = generator.randrange(len(content))
        end = min(len(content), start + generator.randrange(1, 64))
        piece = content[start:end]
        kinds = (
            content[:start],
            content + piece,
            content[:start] + bytes(len(piece)) + content[end:],
            content[:start] + content[end:],
            content[:end] + piece + content[end:],
            content[:start] + bytes(generator.randrange(256) for _ in piece) + content[end:],
        )
        made.append(kinds[at % len(kinds)])
    return made


def unless_refused(call: Callable[[], T]) -> T | None:
    """What a call gives; None where it refuses its input, in one line with a fix."""
    refusal = None
    try:
        return call()
    except UserError as error:
        refusal = error
    assert refusal.fix
    assert "\n" not in str(refusal)
    assert len(str(refusal)) < 1500
    return None
