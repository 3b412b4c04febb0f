"""The pages of docs/commands: each command's arguments and options, as its signature declares them."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from pathlib import Path
from typing import Any

import typer
import yaml
from page_text import DOCS, NOTE, cell, first_sentence, prose, table

EXAMPLES = yaml.safe_load((DOCS / "command_examples.yaml").read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class Command:
    """A command's function, or a group of commands."""

    name: str
    function: Any
    group: typer.Typer | None = None

    @property
    def help(self) -> str:
        """The function's docstring, or what the group says of itself."""
        return str(self.group.info.help) if self.group is not None else inspect.cleandoc(self.function.__doc__ or "")

    @property
    def inner(self) -> list[Command]:
        """The commands of a group."""
        return [Command(str(info.name), info.callback) for info in self.group.registered_commands] if self.group else []


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One argument or option of a command, as its signature declares it."""

    name: str
    hint: Any
    info: Any
    default: Any

    @property
    def argument(self) -> bool:
        return isinstance(self.info, typer.models.ArgumentInfo)

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def word(self) -> str:
        """How an argument is written in the usage line."""
        word = str(self.info.metavar or self.name.upper())
        if _word(self.hint).endswith("repeatable") and not word.endswith("..."):
            word += "..."
        return word if self.required else f"[{word}]"

    @property
    def flags(self) -> list[str]:
        """Long name first. In Annotated, typer keeps the first declared name where a default would stand."""
        declared = [name for name in (self.info.default, *(self.info.param_decls or ())) if isinstance(name, str)]
        return sorted(declared, key=len, reverse=True)

    @property
    def value(self) -> str:
        """What follows an option; nothing after a switch."""
        word, metavar = _word(self.hint), self.info.metavar
        if metavar and metavar.endswith(",..."):
            return str(metavar)
        return word if not metavar or self.argument else word.replace("TEXT", metavar.replace("|", ", "))


def _word(hint: Any) -> str:
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _word(next(arm for arm in arms if arm is not type(None)))
    if origin is list:
        return f"{_word(arms[0])}, repeatable"
    if origin is tuple:
        return " ".join(_word(arm) for arm in arms)
    if origin is typing.Literal:
        return ", ".join(f"`{arm}`" for arm in arms)
    return {bool: "", int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}[hint]


def _parameters(function: Any) -> list[Parameter]:
    hints = typing.get_type_hints(function, include_extras=True)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        if typing.get_origin(hints[name]) is not typing.Annotated:  # the context, which no one types
            continue
        hint, info = typing.get_args(hints[name])[:2]
        found.append(Parameter(name, hint, info, parameter.default))
    return found


def command_index(commands: list[Command]) -> str:
    rows = [(f"[{command.name}]({command.name}.md)", first_sentence(command.help)) for command in commands]
    return (
        f"{NOTE}# Commands\n\n{table(('command', 'what it does'), rows)}\n"
        "Every command takes `--quiet` (no progress bars), `--debug` (tracebacks) and `--help`. Exit code 0 is\n"
        "success, 2 bad input with one line that says what to do, 1 anything else.\n\n"
        "In the examples `MODEL` is a model's folder or hub id, `my-text.txt` and `held-out.txt` are texts, `pruned`\n"
        "is a folder that `prune` wrote, and `dense-ds` and `pruned-ds` are what `export --target deepsparse` made of\n"
        "both.\n"
    )


def command_page(command: Command) -> str:
    parts = [f"{NOTE}# sparsedeploy {command.name}\n", f"{prose(command.help)}\n"]
    if command.group is None:
        parts.append(_usage(command.name, command))
    for inner in command.inner:
        name = f"{command.name} {inner.name}"
        parts.append(f"## sparsedeploy {name}\n\n{prose(inner.help)}\n\n{_usage(name, inner)}")
    if command.name in EXAMPLES:
        parts.append(f"## Examples\n\n{EXAMPLES[command.name]}")
    return "\n".join(parts)


def _usage(name: str, command: Command) -> str:
    parameters = _parameters(command.function)
    arguments = [item for item in parameters if item.argument]
    options = [item for item in parameters if not item.argument]
    needed = [f"{item.flags[0]} {item.value}" for item in options if item.required]
    words = " ".join([name, *(item.word for item in arguments), *needed, "[OPTIONS]"])
    text = f"```text\nsparsedeploy {words}\n```\n\n"
    if arguments:
        rows = [(f"`{item.word}`", cell(item.info.help)) for item in arguments]
        text += table(("argument", "meaning"), rows) + "\n"
    listed = [
        (", ".join(f"`{flag}`" for flag in item.flags), item.value, _default(item), cell(item.info.help))
        for item in options
    ]
    return text + (table(("option", "value", "default", "meaning"), listed) + "\n" if listed else "")


def _default(item: Parameter) -> str:
    if item.required:
        return "required"
    default = ",".join(item.default) if isinstance(item.default, list) else item.default
    return "" if default is None or default is False else f"`{default}`"
