"""Flags over all commands: a short one means one thing everywhere, and every option has its help."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import pytest
from typer.main import get_command

from sparsedeploy.cli.main import app
from sparsedeploy.options import described
from sparsedeploy.registry import ALLOCATORS, PRUNERS, RECOVERIES, TARGETS
from sparsedeploy.targets.options import ExportOptions
from sparsedeploy.workflows.options import PruneOptions, RecoverOptions


def commands(group: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its name, groups' own included."""
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{path} {name}".strip())


COMMANDS = dict(commands(get_command(app)))


def test_a_short_flag_means_one_thing_everywhere() -> None:
    meanings: dict[str, set[str]] = {}
    for command in COMMANDS.values():
        for parameter in command.params:
            long = [flag for flag in parameter.opts if flag.startswith("--")]
            for flag in parameter.opts:
                if flag.startswith("-") and not flag.startswith("--"):
                    meanings.setdefault(flag, set()).update(long)
    assert {"-c", "-d", "-m", "-n", "-o", "-s", "-t"} <= meanings.keys()
    assert {flag: names for flag, names in meanings.items() if len(names) != 1} == {}


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_of_a_command_differ_and_are_explained(name: str) -> None:
    flags = [flag for parameter in COMMANDS[name].params for flag in parameter.opts if flag.startswith("-")]
    assert len(flags) == len(set(flags))
    unexplained = [p.name for p in COMMANDS[name].params if p.name != "help" and not getattr(p, "help", None)]
    assert not unexplained


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if not hasattr(command, "commands")])
def test_every_option_is_a_field_of_a_dataclass(name: str) -> None:
    command = COMMANDS[name]
    own = set(inspect.signature(inspect.unwrap(command.callback)).parameters)
    options = {p.opts[0] for p in command.params if p.name in own and p.param_type_name == "option"}
    assert options <= {"--output", "--json"}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_on_can_be_turned_off(name: str) -> None:
    stuck = [
        p.name for p in COMMANDS[name].params if getattr(p, "is_flag", False) and p.default and not p.secondary_opts
    ]
    assert not stuck


def test_help_of_quantize_names_the_schemes_of_every_target() -> None:
    text = next(item for item in described(ExportOptions) if item.name == "quantize").facts.help
    for target in TARGETS:
        for item in described(target.options):
            if item.name == "quantize":
                assert f"{target.name}: {', '.join(get_args(item.arms[0]))}" in text


# Text that never is a path, though a file or folder may have the same name.
_WORDS = {"prompt", "repo", "name", "--data-field", "--train-field", "--split", "--message", "--host", "--module"}
_WORDS |= {"--within", "--threshold", "--pick", "--pattern", "--quantize", "--preset", "--device", "--tasks", "--with"}


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if not hasattr(command, "commands")])
def test_what_may_be_a_path_is_declared(name: str) -> None:
    """Every text is one of a few words, a word of its own, or may be a path and says so."""
    command = COMMANDS[name]
    for item in getattr(command.callback, "flags", {}).values():
        facts, kinds = item.facts, (item.kind, *get_args(item.arms[0]))
        if str not in kinds or item.kind is Mapping or facts.reads or facts.choices or item.values:
            continue
        assert item.flag in _WORDS, item.flag


def test_defaults_that_may_be_paths() -> None:
    """Where nothing reads the default it is no input, which is tested for each of these commands."""
    found = {
        (name, item.flag)
        for name, command in COMMANDS.items()
        for item in getattr(command.callback, "flags", {}).values()
        if item.facts.reads and not item.required and item.default
    }
    assert found == {(name, "--data") for name in ("prune", "recover", "allocate", "deploy")}


def test_pairs_that_may_be_paths_are_declared() -> None:
    for owner, name, registry in (
        (ExportOptions, "options", TARGETS),
        (PruneOptions, "allocation_options", ALLOCATORS),
        (PruneOptions, "method_options", PRUNERS),
        (RecoverOptions, "options", RECOVERIES),
    ):
        (declared,) = [item.facts.reads for item in described(owner) if item.name == name]
        found = {item.name for method in registry for item in described(method.options) if item.facts.reads}
        assert found == set(declared or ()), name
