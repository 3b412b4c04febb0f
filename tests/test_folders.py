"""Output folders appear whole or not at all."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsedeploy.errors import UserError
from sparsedeploy.folders import new_folder, write_json


def test_success_renames_and_failure_leaves_nothing(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "out") as staging:
        (staging / "file").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "file").read_text() == "x"
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "b") as staging:
        (staging / "file").write_text(str(1 / 0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_an_existing_folder_is_kept_unless_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(UserError, match=r"exists\. Choose another, or pass --overwrite"), new_folder(out):
        pass
    with pytest.raises(ZeroDivisionError), new_folder(out, overwrite=True):
        raise ZeroDivisionError
    assert (out / "old").read_text() == "old"
    with new_folder(out, overwrite=True) as staging:
        (staging / "new").write_text("new")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_in_the_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="is a file"), new_folder(tmp_path / "out", overwrite=True):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the disk is full") as caught, new_folder(tmp_path / "out"):
        Path("/dev/full").write_text("x" * 100)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert (tmp_path / "a.json").read_text() == '{\n  "x": 1\n}\n'


def test_a_place_that_cannot_be_written() -> None:
    with pytest.raises(UserError, match=r"cannot write .* Choose a folder"), new_folder(Path(os.devnull) / "a" / "out"):
        pass


def test_importing_the_command_line_is_light() -> None:
    code = "import sys, sparsedeploy.cli.main; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
