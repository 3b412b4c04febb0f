"""Folders with a journal: a kill at any step can be resumed, and what was replaced is whole until the new one is."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsedeploy import folders
from sparsedeploy.checkpoint.journal import ResumeError, journalled_folder
from sparsedeploy.errors import UserError, hint_of
from sparsedeploy.folders import DiskError, partial


def work(output: Path, mode: str) -> None:
    """What ``prune`` does with its folder, in small: two layers of one byte each."""
    with journalled_folder(output, {"seed": 1}, resume="resume" in mode, overwrite=True) as journal:
        if journal.plan is None:
            (journal.folder / "sparsity.json").write_text("new")
            (journal.folder / "layers").write_text("..")
            journal.record_plan({"rate": 0.5})
        for index in range(journal.finished, 2):
            with open(journal.folder / "layers", "r+") as file:
                file.seek(index)
                file.write(str(index))
            journal.record_layer(index, {})


def run(output: Path, count: int, mode: str) -> int:
    """Do the work in a process that kills itself before the given change of the disk, counted from 1."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls = 0

    def killed_before(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **more)

        return step

    try:
        for name in ("rename", "fsync", "mkdir", "unlink", "rmdir", "replace"):
            setattr(os, name, killed_before(getattr(os, name)))
        exchange = folders._exchange if "swap" in mode else lambda one, two: False
        folders._exchange = killed_before(exchange)
        work(output, mode)
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("mode", ["fresh", "swap", "plain"])
def test_a_kill_at_every_step_can_be_resumed(mode: str, tmp_path: Path) -> None:
    """``swap`` and ``plain`` replace an older folder, with and without the exchange of two names."""
    steps = 0
    for count in range(1, 200):
        place = tmp_path / str(count)
        output = place / "out"
        place.mkdir()
        if mode != "fresh":
            output.mkdir()
            (output / "sparsity.json").write_text("old")
        ended = run(output, count, mode)
        if ended == 0:
            break
        assert ended < 0
        steps += 1
        if mode == "swap":  # there at every moment, and whole
            text = (output / "sparsity.json").read_text()
            assert text == "old" or (output / "layers").read_text() == "01"
        assert run(output, 0, f"{mode}-resume") == 0
        found = {path.name: path.read_text() for path in output.iterdir()}
        assert found == {"sparsity.json": "new", "layers": "01"}, f"killed before step {count}"
        assert [path.name for path in place.iterdir()] == ["out"], f"killed before step {count}"
    assert steps > 10


@pytest.mark.parametrize("mode", ["swap", "plain"])
def test_without_resume_a_killed_run_is_cleared_away(mode: str, tmp_path: Path) -> None:
    for count in range(1, 200, 3):
        place = tmp_path / str(count)
        output = place / "out"
        output.mkdir(parents=True)
        (output / "sparsity.json").write_text("old")
        ended = run(output, count, mode)
        assert run(output, 0, mode) == 0
        assert [path.name for path in place.iterdir()] == ["out"], f"killed before step {count}"
        assert sorted(path.name for path in output.iterdir()) == ["layers", "sparsity.json"]
        if ended == 0:
            break


def begin(output: Path, error: BaseException | None, *, resume: bool = False, layers: int = 1) -> None:
    with journalled_folder(output, {"seed": 1}, resume=resume, overwrite=False) as journal:
        if layers:
            journal.record_plan({"rate": 0.5})
            for index in range(layers):
                journal.record_layer(index, {})
        if error is not None:
            raise error


def test_what_stays_after_a_failure_says_so(tmp_path: Path) -> None:
    output = tmp_path / "out"
    for error in (KeyboardInterrupt(), RuntimeError("a bug"), OSError(5, "the disk reports an error")):
        with pytest.raises(type(error)) as caught:
            begin(output, error, layers=2)
        assert hint_of(caught.value) == (
            " The plan and 2 finished layers are kept: run the same command with --resume."
        )
        assert partial(output).is_dir()
        assert not output.exists()
    with pytest.raises(DiskError, match=r"cannot write .*out: the disk is full\. .* --resume: .* 1 finished"):
        begin(output, OSError(28, "No space left on device"))
    begin(output, None, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), OSError(28, "full")])
def test_nothing_stays_when_there_is_nothing_to_resume(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises((type(error), DiskError)) as caught:
        begin(tmp_path / "out", error, layers=0)
    assert hint_of(caught.value) == ""
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="bad input"):
        begin(tmp_path / "out", UserError("bad input", "Change it."))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    ["[]\n", "7\n", '{"request": 7}\n', '{"request": {"seed": 1}}\n"x"\n', "{}\n", "[" * 100_000 + "\n", "\xff\n"],
)
def test_a_damaged_journal_is_named_and_kept(text: str, tmp_path: Path) -> None:
    folder = partial(tmp_path / "out")
    folder.mkdir()
    (folder / "journal.jsonl").write_text(text, encoding="latin-1")
    with pytest.raises(ResumeError, match=r"journal\.jsonl.*Run without --resume"):
        begin(tmp_path / "out", None, resume=True)
    assert (folder / "journal.jsonl").read_text(encoding="latin-1") == text
    begin(tmp_path / "out", None)
