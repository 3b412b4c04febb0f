"""What every command does before its work: it checks the paths that it was given and the number of processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from sparsedeploy.cli.examples import EXAMPLES
from sparsedeploy.paths import check_file_output, check_output, check_regular, expand
from sparsedeploy.processes import refuse_several

# The parameter that names what is written, beside options that write files, and those of text that is not a path.
_OUTPUT = "output"
_PLAIN = ("prompt",)
# The commands whose --output is a folder; the workflows keep that one to themselves (folders.claim).
_MAKE_FOLDERS = ("prune", "recover", "sweep", "export", "demo", "deploy", "import")
# The commands that several processes can share; what they cannot share of it, the workflows refuse.
_SHARED = ("prune", "recover")


class Command(TyperCommand):
    """A command whose help starts with examples, and that refuses paths which cannot be used, and several processes
    where it cannot share the work.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The examples, then what typer shows."""
        at = ctx
        names: list[str] = []
        while at.parent is not None:
            names.insert(0, str(at.info_name))
            at = at.parent
        for line in EXAMPLES.get(" ".join(names), ()):
            print(line)
        super().format_help(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        """Check, then run.

        Raises:
            UserError: a path or the processes are refused.
        """
        if self.name not in _SHARED:
            refuse_several(f"the command {self.name}")
        check_paths(str(self.name), ctx)
        return super().invoke(ctx)


def check_paths(command: str, ctx: typer.Context) -> None:
    """Expand ``~`` in the parameters, in place, and refuse inputs without an end and outputs that cannot be written.

    Raises:
        UserError: such a path, before anything was read or written.
    """
    for name, value in ctx.params.items():
        if isinstance(value, Path) or (isinstance(value, str) and value.startswith("~") and name not in _PLAIN):
            ctx.params[name] = type(value)(expand(value))
    inputs = list(_inputs(ctx))
    for path in inputs:
        check_regular(path)
    for name in _outputs(ctx):
        output = ctx.params.get(name)
        if not isinstance(output, Path):
            continue
        if name == _OUTPUT and command in _MAKE_FOLDERS:
            check_output(output)
        else:
            check_file_output(output, inputs)


def _outputs(ctx: typer.Context) -> set[str]:
    """The parameters that name what is written."""
    return {_OUTPUT, *getattr(ctx.command.callback, "writes", ())}


def _inputs(ctx: typer.Context) -> Iterator[str]:
    """Every path on this machine that the parameters name, but for the outputs."""
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if name in {*_outputs(ctx), *_PLAIN}:
            continue
        value = ctx.params.get(name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(item, (str, Path)):
                continue
            # NAME=PATH and NAME=VALUE stand for paths too.
            for text in {str(item), str(item).partition("=")[2]} - {""}:
                if "\0" not in text and os.path.lexists(text):
                    yield text
