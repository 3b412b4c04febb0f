"""Commands that repeat what a job did, written from the very options that it ran with."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from sparsedeploy.conversion import plain_options, typed_words
from sparsedeploy.options import Options, described


def command_line(name: str, model: str | Path, *sections: Options, output: Path | None = None) -> str:
    """A command as it can be typed in a shell.

    Args:
        model: the first argument.
        sections: the options, with those of their own sections; what has its default value is left out.
    """
    words = ["sparsedeploy", name, str(model), *(["-o", str(output)] if output is not None else [])]
    return shlex.join([*words, *(word for section in sections for word in _words(section))])


def _words(options: Options) -> Iterator[str]:
    yield from typed_words(type(options), plain_options(options))
    for each in described(type(options)):
        if isinstance(section := getattr(options, each.name), Options):
            yield from _words(section)
