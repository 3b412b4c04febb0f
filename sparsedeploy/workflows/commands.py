"""Commands that repeat what a job did, written from the very options that it ran with."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from sparsedeploy.conversion import plain_options, typed_words
from sparsedeploy.options import Options, described
from sparsedeploy.workflows.options import RECOVER_FLAGS, RecoverOptions


def command_line(name: str, model: str | Path, *sections: Options, output: Path | None = None) -> str:
    """A command as it can be typed in a shell.

    Args:
        model: the first argument.
        sections: the options, with those of their own sections; what has its default value is left out.
    """
    words = ["sparsedeploy", name, str(model), *(["-o", str(output)] if output is not None else [])]
    return shlex.join([*words, *(word for section in sections for word in _words(name, section))])


def _words(name: str, options: Options) -> Iterator[str]:
    own = name == "recover" and isinstance(options, RecoverOptions)
    flags = {option: names[0] for option, names in RECOVER_FLAGS.items()} if own else {}
    yield from typed_words(type(options), plain_options(options), **flags)
    for each in described(type(options)):
        if isinstance(section := getattr(options, each.name), Options):
            yield from _words(name, section)
