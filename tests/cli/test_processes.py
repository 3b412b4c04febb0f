"""Several processes, signals and pipes, as the command line meets them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsedeploy.cli.edge import Command
from tests.cli.conftest import Outcome
from tests.cli.test_bad_input import refused
from tests.cli.test_flags import COMMANDS

Cli = Callable[..., Outcome]


@pytest.mark.parametrize(
    "command",
    [
        ("recover", "dense", "-o", "out"),
        ("allocate", "dense", "-o", "plan.json", "-s", "0.5"),
        ("export", "dense", "-t", "vllm", "-o", "out"),
        ("eval", "dense"),
        ("inspect", "dense"),
        ("bench", "dense", "--baseline", "dense"),
        ("generate", "dense", "a prompt"),
        ("serve", "dense"),
        ("demo", "-o", "out"),
        ("runtime", "list"),
        (
            "prune",
            "dense",
            "-o",
            "out",
            "-s",
            "0.5",
            "-m",
            "magnitude",
            "--recover",
            "lora",
            "--train-data",
            "text.txt",
        ),
    ],
)
def test_what_several_processes_cannot_share_is_refused(
    command: tuple[str, ...], cli: Cli, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    refused(cli(*command), "2 processes cannot share", model.parent)


def test_every_command_checks_its_processes() -> None:
    leaves = {name: command for name, command in COMMANDS.items() if not hasattr(command, "commands")}
    assert len(leaves) > 10
    assert [name for name, command in leaves.items() if not isinstance(command, Command)] == []


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "first"}, "RANK is 'first', which is not a number"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0', which is not a number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', which is not a number"),
        ({"WORLD_SIZE": "0"}, "RANK is 0 of WORLD_SIZE 0"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2', which is not a number"),
        ({"RANK": "3"}, "RANK is 3 of WORLD_SIZE 1"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2 and MASTER_ADDR is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "y"},
            "MASTER_PORT is 'y', which is not a number",
        ),
    ],
)
def test_a_wrong_environment_is_one_line(
    variables: dict[str, str], message: str, cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    outcome = cli("prune", model, "-o", model.parent / "out", "-s", 0.5, "-m", "magnitude")
    refused(outcome, message, model.parent)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "sparsedeploy", *map(str, arguments)]


_STOPPED = """
from sparsedeploy.startup import quick_start
quick_start()
import os, signal
from sparsedeploy.checkpoint import journal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us with it ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)
original = journal.Journal.record_layer
def stopped(self, index, losses):
    original(self, index, losses)
    os.kill(os.getpid(), NUMBER)
journal.Journal.record_layer = stopped
from sparsedeploy.cli.main import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_prune_and_keeps_what_is_finished(number: signal.Signals, model: Path, cli: Cli) -> None:
    arguments = ["prune", str(model), "-o", str(model.parent / "out"), "-s", "0.5", "-m", "magnitude", "-q"]
    script = _STOPPED.replace("NUMBER", str(int(number)))
    run = [sys.executable, "-c", script, *arguments]
    ended = subprocess.run(run, capture_output=True, text=True, check=False)
    assert ended.returncode == 128 + number
    assert ended.stderr == ("stopped. The plan and 1 finished layer are kept: run the same command with --resume.\n")
    assert cli(*arguments, "--resume").code == 0
    assert sorted(path.name for path in model.parent.iterdir()) == ["dense", "out"]


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["reader", "stdout", "ascii"])
def test_the_place_of_the_output_does_not_decide_the_exit_code(closed: str, model: Path, tmp_path: Path) -> None:
    run = command("runtime", "list")
    variables = {**os.environ, "SPARSEDEPLOY_HOME": str(tmp_path / "home")}
    if closed == "ascii":
        done = subprocess.run(
            run, capture_output=True, check=False, env={**variables, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii()
        return
    if closed == "stdout":
        shell = f"exec {sys.executable} -m sparsedeploy runtime list >&-"
        assert subprocess.run(["sh", "-c", shell], check=False, env=variables).returncode == 0
        return
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(run, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, env=variables)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
