"""A run that a signal or a full disk stops: one line, nothing half written, and --resume finishes it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparsedeploy.checkpoint.manifest import load_manifest
from sparsedeploy.folders import write_bytes
from tests.cli.conftest import Outcome

Cli = Callable[..., Outcome]
pytestmark = pytest.mark.slow

_LIMITED = """
from sparsedeploy.startup import quick_start
quick_start()
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
del sys.argv[1]
from sparsedeploy.cli.main import main
main()
"""
_STOPPED = """
from sparsedeploy.startup import quick_start
quick_start()
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started us with it ignored
from sparsedeploy.recovery.state import RunState
original = RunState.save
def stopped(self, *arguments):
    original(self, *arguments)
    os.kill(os.getpid(), NUMBER)
RunState.save = stopped
from sparsedeploy.cli.main import main
main()
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system whose size a test sets; skipped where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def resize(place: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(place)], capture_output=True, check=True)


def arguments(job: str, model: Path, text: Path, output: Path, cli: Cli) -> list[str]:
    """The command line of a job that writes checkpoints; ``recover`` gets its pruned model made."""
    if job == "prune":
        words = ["prune", model, "-o", output, "-s", 0.5, "-m", "magnitude", "-q"]
    else:
        pruned = model.parent / "pruned"
        if not pruned.exists():
            assert cli("prune", model, "-o", pruned, "-s", 0.5, "-m", "magnitude", "-q").code == 0
        words = ["recover", pruned, "-o", output, "-m", "sparse-lora", "--train-data", text, "--train-samples", 8]
        words += ["--train-length", 32, "-q"]
        for option in ("batch_size=2", "accumulation=1", "save_every=1"):
            words += ["--train-option", option]
    return [str(word) for word in words]


def run(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, check=False)


def finished(cli: Cli, words: list[str], output: Path) -> None:
    """Resume, and find the result sound and alone."""
    before = {path.name for path in output.parent.iterdir() if not path.name.startswith(".")}
    outcome = cli(*words, "--resume")
    assert outcome.code == 0, outcome.err
    assert {path.name for path in output.parent.iterdir()} == before | {output.name}
    assert cli("inspect", output, "-q").code == 0


@pytest.mark.parametrize("job", ["prune", "recover"])
def test_a_file_that_may_not_grow(job: str, model: Path, text: Path, cli: Cli) -> None:
    output = model.parent / "out"
    words = arguments(job, model, text, output, cli)
    ended = run(_LIMITED, (model / "model.safetensors").stat().st_size // 2, *words)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1
    assert f"error: cannot write {output}: a file would exceed the size limit. Raise it (ulimit" in ended.stderr
    assert not output.exists()
    finished(cli, words, output)


@pytest.mark.parametrize("job", ["prune", "recover"])
def test_a_disk_that_fills_up(job: str, model: Path, text: Path, small_disk: Path, cli: Cli) -> None:
    output = small_disk / "out"
    words = arguments(job, model, text, output, cli)
    resize(small_disk, (model / "model.safetensors").stat().st_size // 1024 + 16)
    outcome = cli(*words)
    assert outcome.code == 2, outcome.err
    assert outcome.err.count("\n") == 1
    assert "the disk is" in outcome.err
    assert not output.exists()
    resize(small_disk, 8192)
    finished(cli, words, output)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_ends_recover_and_keeps_what_is_trained(
    number: signal.Signals, model: Path, text: Path, cli: Cli
) -> None:
    output = model.parent / "out"
    words = arguments("recover", model, text, output, cli)
    ended = run(_STOPPED.replace("NUMBER", str(int(number))), *words)
    assert ended.returncode == 128 + number
    assert ended.stderr == "stopped. What was trained is kept: run the same command with --resume.\n"
    assert not output.exists()
    finished(cli, words, output)
    whole = model.parent / "whole"
    assert cli(*[str(whole) if word == str(output) else word for word in words]).code == 0
    assert load_manifest(whole).files == load_manifest(output).files


def test_a_killed_writer_of_one_file_leaves_nothing_behind_for_long(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from sparsedeploy import folders\n"
        "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
        "folders.write_bytes(Path(sys.argv[1]), b'torn')"
    )
    path = tmp_path / "result[1].json"
    assert run(code, path).returncode == -signal.SIGKILL
    (tmp_path / ".result[1].json.mine.tmp").write_text("not ours")
    living = tmp_path / f".result[1].json.{os.getpid()}.abcd.tmp"
    living.write_text("being written")
    assert len(list(tmp_path.iterdir())) == 3
    write_bytes(path, b"whole")
    assert {one.name for one in tmp_path.iterdir()} == {path.name, ".result[1].json.mine.tmp", living.name}
