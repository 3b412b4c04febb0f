"""Files that anyone may have written."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsedeploy.errors import UserError
from sparsedeploy.reading import Fields, contained, parse_json, read_bytes, read_object, read_text

FIX = "Get another."


@pytest.fixture
def alarm() -> Iterator[None]:
    """End the test after 20 seconds: opening a pipe that nobody writes to would wait for ever."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_objects_come_back_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b'{"a": [1, 2.5, null, true], "\xc3\xa9": "\\ud83d\\ude00", "limit": [0, Infinity]}')
    value = read_object(file, fix=FIX)
    assert value == {"a": [1, 2.5, None, True], "é": "😀", "limit": [0, float("inf")]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a": 1} {"b": 2}', "not valid JSON"),
        (b"[1]", "is a list, not a JSON object"),
        (b'"x"', "is a string"),
        (b"null", "is null"),
        (b"true", "is true or false"),
        (b"3", "is a number"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ('{"a": "é"}'.encode("latin-1"), "UTF-8 (byte 7)"),
        ("{}".encode("utf-16"), "UTF-8"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        (b'{"x": {"y": [{"k": 1, "k": 1}]}}', "the key 'k' twice"),
        (b"[" * 100_000 + b"]" * 100_000, "nested deeper"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested deeper"),
        (b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}", "nested deeper"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": "\\ud800"}', "surrogate"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_object(file, fix=FIX)
    assert said in refused.value.message
    assert str(file) in refused.value.message
    assert refused.value.fix


def test_deep_is_counted_in_levels_not_in_brackets() -> None:
    assert parse_json("[" + "[]," * 500 + "[]]", "x", fix=FIX)[0] == []
    assert parse_json("[" * 100 + "]" * 100, "x", fix=FIX)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name on this system")
@pytest.mark.usefixtures("alarm")
def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "circle").symlink_to("circle")
    for path, said in (
        (tmp_path / "pipe", "a pipe"),
        (tmp_path / "link", "a pipe"),
        (tmp_path, "a folder"),
        (Path("/dev/zero"), "a device"),
        (tmp_path / "circle", "cannot read"),
        (tmp_path / "none", "cannot read"),
        (tmp_path / "a\0b", "cannot read"),
    ):
        with pytest.raises(UserError, match=said):
            read_bytes(path, fix=FIX)


def test_a_file_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="larger than"):
        read_bytes(tmp_path / "large", limit=1 << 20, fix=FIX)


def test_text_loses_its_mark_and_keeps_every_other_separator(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffa\r\nb\u2028c\x0b\x0c\x85d".encode())
    assert read_text(tmp_path / "a.txt", fix=FIX) == "a\nb\u2028c\x0b\x0c\x85d"
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 2\)"):
        read_text(tmp_path / "a.txt", fix=FIX)


@dataclasses.dataclass(frozen=True)
class Inner:
    x: float


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    count: int
    inner: Inner
    files: dict[str, str]
    maybe: Inner | None = None
    flag: bool = False


def test_a_dataclass_is_built_from_its_fields() -> None:
    values = {"name": "n", "count": 3, "inner": {"x": 1}, "files": {"a": "b"}, "other": None, "maybe": None}
    assert Fields(values, "f", FIX).build(Outer) == Outer("n", 3, Inner(1), {"a": "b"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": None}, "f: 'name' is null, not a string"),
        ({"count": "3"}, "f: 'count' is a string, not an integer"),
        ({"count": True}, "f: 'count' is true or false, not an integer"),
        ({"count": 3.0}, "f: 'count' is a number, not an integer"),
        ({"count": -1}, "f: 'count' is -1, not from 0"),
        ({"count": 10**4000}, "f: 'count' is a number of about"),
        ({"inner": []}, "f: 'inner' is a list, not an object"),
        ({"inner": {}}, "f: inner lacks 'x'"),
        ({"inner": {"x": float("nan")}}, "f: inner: 'x' is not a finite number"),
        ({"inner": {"x": 10**4000}}, "f: inner: 'x' is not a finite number"),
        ({"files": {"a": 1}}, "f: files: 'a' is a number, not a string"),
        ({"maybe": {"x": "1"}}, "f: maybe: 'x' is a string, not a number"),
        ({"flag": 1}, "f: 'flag' is a number, not true or false"),
    ],
)
def test_a_field_of_another_type_is_named(change: dict[str, object], said: str) -> None:
    values = {"name": "n", "count": 3, "inner": {"x": 1}, "files": {"a": "b"}, **change}
    with pytest.raises(UserError) as refused:
        Fields(values, "f", FIX).build(Outer)
    assert refused.value.message.startswith(said)
    assert refused.value.fix == FIX


@pytest.mark.parametrize("name", ["", "../x", "a/../../x", "/etc/passwd", "a\\b", "a\0b", ".."])
def test_a_listed_name_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="not a name inside its folder"):
        contained(tmp_path, name, "index")


def test_a_link_stays_in_its_folder_or_in_the_blobs_of_its_hub_snapshot(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (blobs / "1").write_text("x")
    (snapshot / "good").symlink_to("../../blobs/1")
    (snapshot / "bad").symlink_to(tmp_path / "outside")
    (snapshot / "same").symlink_to("good")
    assert contained(snapshot, "good", "index") == snapshot / "good"
    assert contained(snapshot, "same", "index") == snapshot / "same"
    with pytest.raises(UserError, match="link out of its folder"):
        contained(snapshot, "bad", "index")
    (tmp_path / "linked").symlink_to(snapshot, target_is_directory=True)
    assert contained(tmp_path / "linked", "good", "index")
