"""A typed flag counts, or is refused by name: nothing that a user writes is ignored."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import typer

from sparsedeploy.cli.main import _USAGE_ERROR
from sparsedeploy.errors import UserError
from sparsedeploy.plan import ModuleTarget, SparsityPlan
from tests.cli.conftest import Outcome
from tests.cli.test_flags import COMMANDS

Cli = Callable[..., Outcome]


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    SparsityPlan(0.5, "unstructured", "uniform", (ModuleTarget("a", 4, 8, 4),)).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def refused(outcome: Outcome, message: str) -> None:
    assert outcome.code == 2, outcome.err
    them = "them" if " have no effect" in message else "it"
    asked = f", or add {message.partition(' without ')[2]}" if " without " in message else ""
    assert outcome.err == f"error: {message}. Leave {them} out{asked}.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-s 0.5 --train-samples 5", "--train-samples has no effect: there is no --recover"),
        (
            "-s 0.5 --recover-option steps=2 --train-option clip=1",
            "--recover-option and --train-option have no effect: there is no --recover",
        ),
        ("-s 0.5 -m magnitude --samples 3", "--samples has no effect: magnitude and uniform read no calibration text"),
        ("-s 0.5 --recover sparselo --train-length 99", "--train-length has no effect: sparselo does not train"),
        ("-s 0.5 --recover sparselo --train-option clip=1", "--train-option has no effect: sparselo does not train"),
    ],
)
def test_prune(cli: Cli, arguments: str, message: str) -> None:
    refused(cli("prune", "nowhere", "-o", "out", *arguments.split()), message)


@pytest.mark.parametrize("flag", ["--sparsity 0.5", "--pattern 2:4", "--allocation owl", "--allocation-option m=4"])
def test_prune_by_a_plan(cli: Cli, plan: Path, flag: str) -> None:
    outcome = cli("prune", "nowhere", "-o", "out", "--plan", plan, *flag.split())
    refused(outcome, f"{flag.split(maxsplit=1)[0]} has no effect: the plan decides it")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-m sparse-lora --samples 99", "--samples has no effect: sparse-lora reads no calibration text"),
        ("-m sparselo --train-data x", "--train-data has no effect: sparselo does not train"),
        ("-m lora --dense x", "--dense has no effect: lora starts from the pruned model"),
    ],
)
def test_recover(cli: Cli, arguments: str, message: str) -> None:
    refused(cli("recover", "nowhere", "-o", "out", *arguments.split()), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-a owl -m sparsegpt", "--method has no effect: owl does not prune"),
        ("-a atp --method-option block=8", "--method-option has no effect: atp does not prune"),
        ("-a uniform --data x", "--data has no effect: uniform reads no calibration text"),
    ],
)
def test_allocate(cli: Cli, arguments: str, message: str) -> None:
    refused(cli("allocate", "nowhere", "-o", "plan.json", "-s", 0.5, *arguments.split()), message)


def refused_at_once(cli: Cli, arguments: str, message: str) -> None:
    outcome = cli("prune", "nowhere", "-o", "out", *arguments.split())
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--samples 0", "--samples is '0'. It takes a whole number of at least 1"),
        ("--samples 99999999999999999999", "--samples is '99999999999999999999'. It takes a whole number"),
        ("--batch-size 0", "--batch-size is '0'. It takes a whole number of at least 1"),
        ("--accumulate float16", "--accumulate is 'float16'. It takes float32 or float64"),
        ("--seed -1", "--seed is '-1'. It takes a whole number of at least 0"),
        ("--samples 1e9", "--samples is '1e9'. It takes a whole number"),
        ("-s half", "--sparsity is 'half'. It takes a finite number"),
    ],
)
def test_a_bad_value_is_named_by_its_flag(cli: Cli, arguments: str, message: str) -> None:
    refused_at_once(cli, arguments, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("eval nowhere --tasks x --split test", "--split has no effect without --data"),
        ("eval nowhere --data x --limit 3 --seed 1", "--limit and --seed have no effect without --tasks"),
        ("bench --compare a b --rounds 3 -b x", "--baseline and --rounds have no effect: --compare measures nothing"),
        ("bench --compare a b --csv c", "--csv has no effect: --compare measures nothing"),
        ("bench a --baseline b --threshold 3%", "--threshold has no effect without --compare"),
        ("generate nowhere text --seed 3", "--seed has no effect without --temperature"),
    ],
)
def test_other_commands(cli: Cli, arguments: str, message: str) -> None:
    refused(cli(*arguments.split()), message)


def _refusal(name: str, words: list[str]) -> str:
    """What a command says of its words before it runs; empty where it takes them, or only lacks an argument."""
    with suppress(typer.Exit, _USAGE_ERROR):
        try:
            COMMANDS[name].make_context(name, words)
        except UserError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if not hasattr(command, "commands")])
def test_an_option_that_is_given_twice(name: str) -> None:
    """Two values of an option that takes one: neither is dropped silently. Options of several values take both."""
    for option in COMMANDS[name].params:
        if option.param_type_name != "option" or option.is_eager:
            continue
        on, off = max(option.opts, key=len), max(option.secondary_opts, key=len, default="")
        if option.is_flag:
            words, message = [on, off or on], f"{on} and {off} are both given. Leave one out."
        else:
            one, two = ([value] * option.nargs for value in ("a=1", "b=2"))
            words = [on, *one, min(option.opts, key=len), *two]
            message = f"{on} is given twice, as {' '.join(one)} and as {' '.join(two)}. Give it once."
        repeatable = option.multiple or (option.is_flag and not off)
        assert _refusal(name, words) == ("" if repeatable else message), words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-s 0.5 --sparsity=0.6", "--sparsity is given twice, as 0.5 and as 0.6. Give it once."),
        ("-s0.5 -s 0.6 -s 0.7", "--sparsity is given twice, as 0.5 and as 0.6. Give it once."),
        ("-s 0.5 -s 0.5 -m lottery", "unknown pruning method 'lottery'."),
        ("-s 0.5 -m magnitude --method-option a=1 --method-option a=2", "option a is given twice. Give it once."),
        ("-s 0.5 -o elsewhere", "--output is given twice, as out and as elsewhere. Give it once."),
        ("-s 0.5 -m lottery -- -s", "Got unexpected extra argument"),
    ],
)
def test_how_an_option_is_given_twice(cli: Cli, words: str, message: str) -> None:
    refused_at_once(cli, words, message)
