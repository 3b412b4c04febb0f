"""What every command does before its work: it checks the paths that it was given and the number of processes."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from sparsedeploy.cli.examples import EXAMPLES
from sparsedeploy.errors import UserError
from sparsedeploy.options import Described
from sparsedeploy.paths import check_apart, check_file_output, check_output, check_outside, check_regular, expand, shown
from sparsedeploy.processes import refuse_several

# The parameter that names what is written, beside options that write files, and the arguments that are not paths.
_OUTPUT = "output"
_PLAIN = ("prompt", "repo", "name")
# The commands whose --output is a folder; the workflows keep that one to themselves (folders.claim). Some work on in a
# folder that is there, which may hold what they read.
_WORK_IN_FOLDERS = ("sweep", "demo", "deploy")
_MAKE_FOLDERS = ("prune", "recover", "sweep", "export", "demo", "deploy", "import")
# An option with nothing behind its equals sign.
_EMPTY = re.compile(r"--[\w-]+=")
# The commands that several processes can share; what they cannot share of it, the workflows refuse.
_SHARED = ("prune", "recover")


class _Collecting:
    """Adds options to a parser so that each keeps every value that is typed for it, not only the last."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser

    def add_option(self, *, action: str = "store", **how: Any) -> None:
        """What an option calls to be parsed."""
        actions = {"store": "append", "store_const": "append_const"}
        self._parser.add_option(action=actions.get(action, action), **how)


class Command(TyperCommand):
    """A command whose help starts with examples, and that refuses paths which cannot be used, an option that is given
    twice, and several processes where it cannot share the work.
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

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Refuse empty arguments, such as those of an unset variable: an empty path would be the working folder.

        Raises:
            UserError: naming the option, where it has one.
        """
        options = args[: args.index("--")] if "--" in args else args
        for at, item in enumerate(args if not ctx.resilient_parsing else ()):
            flag = item[:-1] if at < len(options) and _EMPTY.fullmatch(item) else None
            if item and flag is None:
                continue
            before = args[at - 1] if 0 < at < len(options) and args[at - 1].startswith("-") else None
            what = flag or before or "an argument"
            raise UserError(f"{what} is empty", "Give a value, or leave it out. Is a shell variable unset?")
        if not ctx.resilient_parsing:
            self._refuse_twice(ctx, args)
        return super().parse_args(ctx, args)

    def _refuse_twice(self, ctx: Any, args: list[str]) -> None:
        """Refuse an option of one value that is given twice with different ones.

        Raises:
            UserError: naming the option.
        """
        parser = self.make_parser(ctx)
        options: list[Any] = [each for each in self.get_params(ctx) if each.param_type_name == "option"]
        single = [each for each in options if not each.multiple]
        for each in single:
            each.add_to_parser(_Collecting(parser), ctx)
        given, _, _ = parser.parse_args(args=list(args))
        for each in single:
            values = list(dict.fromkeys(given.get(each.name) or ()))
            if len(values) < 2:
                continue
            flag = max(each.opts, key=len)
            if isinstance(values[0], bool):
                raise UserError(f"{flag} and {max(each.secondary_opts, key=len)} are both given", "Leave one out.")
            one, two = (shown(value if isinstance(value, str) else " ".join(value)) for value in values[:2])
            raise UserError(f"{flag} is given twice, as {one} and as {two}", "Give it once.")

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
    """Expand ``~`` in the parameters that are paths, in place, and refuse inputs without an end and outputs that cannot
    be written.

    Raises:
        UserError: such a path, or one for two outputs, before anything was read or written.
    """
    outputs = {_OUTPUT, *(name for name, item in _options(ctx).items() if item.facts.writes)}
    readable = {name: value for name, value in ctx.params.items() if name not in outputs and _reads(ctx, name)}
    for name, value in ctx.params.items():
        if isinstance(value, Path) or (name in readable and isinstance(value, str) and value.startswith("~")):
            ctx.params[name] = type(value)(expand(value))
    inputs = [path for name in readable for path in _inputs(ctx, name)]
    for path in inputs:
        check_regular(path)
    seen: set[str] = set()
    for name in outputs:
        output = ctx.params.get(name)
        if not isinstance(output, Path):
            continue
        if (place := os.path.realpath(output)) in seen:
            raise UserError(f"{shown(output)} is given for two outputs", "Name another file for one of them.")
        seen.add(place)
        if name == _OUTPUT and command in _MAKE_FOLDERS:
            check_output(output)
            check = check_outside if command in _WORK_IN_FOLDERS else check_apart
            check(output, inputs)
        else:
            check_file_output(output, inputs)


def _options(ctx: typer.Context) -> Mapping[str, Described]:
    """The parameters that stand for options of dataclasses."""
    return getattr(ctx.command.callback, "flags", {})


def _reads(ctx: typer.Context, name: str) -> bool | tuple[str, ...]:
    """Whether a parameter may name what is read; of NAME=VALUE pairs, the names that may."""
    item = _options(ctx).get(name)
    return name not in _PLAIN if item is None else item.facts.reads or Path in _kinds(item)


def _kinds(item: Described) -> tuple[Any, ...]:
    """The type of an option, or of the values in it."""
    return (item.kind, *typing.get_args(item.arms[0]))


def _inputs(ctx: typer.Context, parameter: str) -> Iterator[str]:
    """Every path on this machine that was typed for a parameter."""
    source = ctx.get_parameter_source(parameter)
    names = _reads(ctx, parameter) if source is None or source.name != "DEFAULT" else False
    value = ctx.params[parameter]
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(item, (str, Path)):
            continue
        name, _, rest = str(item).partition("=")
        # TEXT and RUNTIME=FOLDER may both be paths.
        for text in {str(item), rest} if names is True else {rest} if names and name.strip() in names else ():
            if text and "\0" not in text and os.path.lexists(text):
                yield text
