"""Output folders appear whole or not at all."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsedeploy.errors import UserError
from sparsedeploy.folders import claim, new_folder, write_json


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
    with pytest.raises(UserError, match="files that sparsedeploy did not write"), new_folder(out, overwrite=True):
        pass
    (out / "sparsity.json").write_text("{}")
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
    with (
        pytest.raises(UserError, match=r"cannot write .* Choose another place"),
        new_folder(Path(os.devnull) / "a" / "out"),
    ):
        pass


def test_a_second_run_on_one_output_is_refused_and_leaves_the_first_alone(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from sparsedeploy.folders import claim\n"
    code += "from sparsedeploy.errors import UserError\n"
    code += "try:\n    with claim(Path(sys.argv[1])): print('claimed')\nexcept UserError as error: print(error)"

    def other() -> str:
        command = [sys.executable, "-c", code, str(tmp_path / "out")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with claim(tmp_path / "out"), new_folder(tmp_path / "out") as staging:
        assert (
            other()
            == f"another run is writing {tmp_path / 'out'}. Wait until it has ended, or choose another output.\n"
        )
        (staging / "file").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "out" / "file").unlink()
    assert other() == "claimed\n"


def test_what_a_kill_leaves_is_swept_and_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "m[1]"  # brackets mean nothing in a path
    for name in (".m[1].abcd1234.tmp", ".m[1].abcd1234.old"):
        (tmp_path / name / "m[1]").mkdir(parents=True)
        (tmp_path / name / "m[1]" / "sparsity.json").write_text(name)
    (tmp_path / ".m[1].backup.mine.tmp").mkdir()
    with claim(out, overwrite=True):
        # It was killed between two renames, on a system without the exchange of names.
        assert (out / "sparsity.json").read_text() == ".m[1].abcd1234.old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m[1].backup.mine.tmp", "m[1]"]
    for suffix in ("partial", "recovery"):
        place = tmp_path / f".out.{suffix}"
        place.write_text("mine")
        with pytest.raises(UserError, match="is in the way"), claim(tmp_path / "out"):
            pass
        assert place.read_text() == "mine"
        place.unlink()
        place.mkdir()
        (place / "mine").write_text("mine")
        with pytest.raises(UserError, match="is in the way"), claim(tmp_path / "out"):
            pass
        assert (place / "mine").read_text() == "mine"


def test_parents_that_were_made_for_nothing_go_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), claim(tmp_path / "a" / "b" / "out"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "a" / "b" / "out"):
        pass
    assert (tmp_path / "a" / "b" / "out").is_dir()


@pytest.mark.parametrize("swaps", [True, False])
def test_replacing_works_with_and_without_the_exchange_of_names(
    swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swaps:
        monkeypatch.setattr("sparsedeploy.folders._exchange", lambda one, two: False)
    for text in ("one", "two"):
        with new_folder(tmp_path / "out", overwrite=True) as staging:
            (staging / "sparsity.json").write_text(text)
    assert (tmp_path / "out" / "sparsity.json").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_importing_the_command_line_is_light() -> None:
    code = "import sys, sparsedeploy.cli.main; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
