"""The container files and the unit: what they copy is there, and what they run is a command of ours."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from sparsedeploy.cli.main import app
from sparsedeploy.runtimes.specification import load_runtime, runtime_names

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "export").glob("*/Containerfile"))
UNIT = ROOT / "export" / "common" / "sparsedeploy.service"


def parses(words: list[str]) -> None:
    """The command line takes these words."""
    command, context = typer.main.get_command(app), None
    name = "sparsedeploy"
    while hasattr(command, "commands"):
        context = command.make_context(name, [*words], parent=context)
        name, *words = words
        command = command.commands[name]
    assert command.make_context(name, words, parent=context).params


def test_every_runtime_with_a_server_has_one() -> None:
    served = [name for name in runtime_names() if load_runtime(name).server is not None]
    assert [path.parent.name for path in FILES] == served


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_container_file(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources)
    commands = re.findall(r"sparsedeploy (runtime install [^\n]*)", text)
    assert commands
    for command in commands:
        parses(shlex.split(command))
    entry = re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    assert entry is not None
    program, *words = json.loads(entry[1])
    assert program == "sparsedeploy"
    parses(words)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint on the path")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    done = subprocess.run(["hadolint", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_unit() -> None:
    text = UNIT.read_text(encoding="utf-8")
    start = re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)
    assert start is not None
    program, *words = shlex.split(start[1])
    assert program.endswith("/sparsedeploy")
    parses(words)
    drain = float(words[words.index("--drain") + 1])
    stop = re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert stop is not None
    assert float(stop[1]) > drain  # systemd waits longer than the server drains
    assert "KillMode=mixed" in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on the path")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """Only what is about the unit itself: its program and user are not on this machine."""
    unit = tmp_path / UNIT.name
    unit.write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(encoding="utf-8")))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    about = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert not [line for line in about if "nknown" in line or "nvalid" in line or "Failed to parse" in line], about
