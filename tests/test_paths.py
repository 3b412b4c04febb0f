"""Paths that users name: what cannot be read or written is refused before any work, and inputs are never replaced."""

import os
import socket
import sys
from pathlib import Path

import pytest

import sparsedeploy
from sparsedeploy.errors import UserError
from sparsedeploy.folders import check_writable
from sparsedeploy.paths import check_file_output, check_output, check_outside, check_regular, expand, shown


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("n" * 240, "has a name of 240 bytes, which is too long"),
        ("ü" * 120, "has a name of 240 bytes, which is too long"),
        ("n/" * 2500 + "x", "has a path of .* bytes, which is too long"),
        ("bad\udcff", r"output .*bad\\udcff is not UTF-8"),
        ("file/out", "file is not a folder"),
        ("file/deep/out", "file is not a folder"),
        ("dangling", "is a symbolic link that leads nowhere"),
        ("loop", "is a symbolic link that leads nowhere"),
        ("dangling/out", "dangling is not a folder"),
        ("pipe", "is a pipe"),
    ],
)
def test_outputs_that_cannot_be_written(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        check_output(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("place", ["/proc/out", "/proc/self/out", "/dev/null/out", "/dev/full"])
def test_places_of_the_system(place: str) -> None:
    with pytest.raises(UserError, match=r"takes no files|not a folder|is a device|not writable"):
        check_output(Path(place))


def test_names_that_are_only_unusual_are_fine(tmp_path: Path) -> None:
    for name in ("m[/b]", "a b", "-x", "[red]", "ünï", "new\nline", "n" * 231, "x/../y"):
        check_output(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_unknown_users(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no user 'nobody-here' for the path .* Write \./~nobody-here"):
        expand("~nobody-here/x")
    assert expand("~") == Path.home()
    assert expand("a~b") == Path("a~b")


def test_what_has_no_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for place in (tmp_path / "pipe", tmp_path / "link", tmp_path / "socket", Path("/dev/zero"), Path("/dev/tty")):
        if place.exists():
            with pytest.raises(UserError, match="not a file or folder"):
                check_regular(place)
    for place in (tmp_path, Path(__file__), tmp_path / "nowhere", "a\0b", "x" * 5000):
        check_regular(place)


def test_an_input_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "shelf" / "model"
    model.mkdir(parents=True)
    for folder in (model, model.parent):
        (folder / "sparsity.json").write_text("{}")
    inner = model / "inner"
    inner.mkdir()
    (inner / "sparsity.json").write_text("{}")
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    for source in (model, Path("shelf/model"), tmp_path / "link", Path("shelf/../link"), model / "sparsity.json"):
        for target, word in ((model, "is|holds"), (model.parent, "holds")):
            with pytest.raises(UserError, match=rf"output .* ({word}) the input"):
                check_writable(target, True, [source])
    for source in (model, tmp_path / "link"):
        with pytest.raises(UserError, match=r"output .* lies in the input"):
            check_writable(inner, True, [source])
    with pytest.raises(UserError, match="is a symbolic link"):
        check_writable(tmp_path / "link", True, [])
    check_writable(model, True, ["c4", "nowhere/x", inner.parent.parent / "none", "a\0b"])
    check_writable(tmp_path / "new", False, ["c4", model])
    for target in ("new", "new/deep", "shelf/new", "link/new", "shelf/model/../../new", "nowhere/../new"):
        with pytest.raises(UserError, match=r"output .* lies in the input"):
            check_writable(tmp_path / target, False, ["c4", tmp_path])
    with pytest.raises(UserError, match=r"output link/new lies in the input shelf/model"):
        check_outside(Path("link/new"), [Path("shelf/model")])
    assert not (tmp_path / "new").exists()


def test_the_working_folder_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sparsity.json").write_text("{}")
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    for target in (tmp_path, Path(".."), Path(), Path.home(), Path("/")):
        with pytest.raises(UserError, match="is or holds the working or home folder"):
            check_writable(target, True)


def test_files_replace_results_only(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a result file"):
        check_file_output(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="is a folder"):
        check_file_output(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="lies in the input"):
        check_file_output(tmp_path / "config.json", [tmp_path])
    check_file_output(tmp_path / "config.json", [tmp_path / "notes.txt"])
    with pytest.raises(UserError, match="lies in the input"):
        check_file_output(tmp_path / "new.anything", [tmp_path])


def test_paths_in_messages_are_short_and_printable() -> None:
    assert shown("a\nb\x1b[31m\udcff") == r"a\nb\x1b[31m\udcff"
    assert len(shown("x" * 5000)) < 200


def test_the_home_folder_is_replaced_in_one_place() -> None:
    """``Path.expanduser`` raises a RuntimeError for a user that does not exist; :func:`expand` says so in one line."""
    package = Path(sparsedeploy.__file__).parent
    found = {str(path.relative_to(package)) for path in package.rglob("*.py") if ").expanduser()" in path.read_text()}
    assert found == {"paths.py"}
