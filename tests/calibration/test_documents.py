"""What a text is: rows and documents, whatever stands in them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sparsedeploy.calibration import documents
from sparsedeploy.calibration.documents import instruction_text, is_named, load_documents, read_split
from sparsedeploy.errors import UserError

ODD = "a\u2028b\u2029c\x0bd\x0ce\x85f\x1cg"


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_rows_end_at_newlines_only(tmp_path: Path) -> None:
    lines = json.dumps({"text": ODD}, ensure_ascii=False) + "\r\n\n" + json.dumps({"text": "second"})
    assert load_documents(write(tmp_path / "a.jsonl", lines)) == [ODD, "second"]
    assert load_documents(write(tmp_path / "a.txt", ODD)) == [ODD]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "folder/a.json", "folder/a.jsonl"])
def test_a_byte_order_mark_is_dropped_and_a_file_reads_the_same_in_a_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    write(path, '\ufeff{"text": "one"}\n{"instruction": "Do.", "output": "Done."}\n')
    expected = ["one", instruction_text("Do.", "", "Done.")]
    assert load_documents(str(path)) == expected
    assert load_documents(str(path.parent)) == expected


def test_a_list_of_rows_is_read_from_a_json_file(tmp_path: Path) -> None:
    assert load_documents(write(tmp_path / "a.json", '[\n {"text": "one"},\n {"text": "two"}\n]')) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "null\n", "line 1 is null"),
        ("a.jsonl", '{"text": "x"}\n{"text": null}\n', "line 2: 'text' is null, not a string"),
        ("a.jsonl", '{"text": 3}', "line 1: 'text' is a number"),
        ("a.jsonl", '[{"text": "x"}]', "line 1 is a list"),
        ("a.jsonl", '"x"', "line 1 is a string"),
        ("a.jsonl", '{"body": "x"}', "it has body"),
        ("a.jsonl", "{}", "it has no fields"),
        ("a.jsonl", '{"text": "x"', "line 1 is not valid JSON"),
        ("a.jsonl", "[" * 100_000, "line 1 is nested deeper"),
        ("a.jsonl", '{"text": "\\ud800"}', "surrogate"),
        ("a.jsonl", '{"text": "x", "text": "y"}', "'text' twice"),
        ("a.jsonl", b'{"text": "\xff"}', "not UTF-8"),
        ("a.json", '[{"text": "x"}, null]', "row 2 is null"),
        ("a.json", '{\n "text": "x"\n}', "line 1 is not valid JSON"),
        ("a.json", '[{"text": "x"}', "not valid JSON"),
        ("a.txt", b"\xff\xfea\x00", "not UTF-8"),
        ("a.txt", "", "holds no text"),
        ("a.txt", "\ufeff \n", "holds no text"),
        ("a.jsonl", "\n\n", "holds no text"),
        ("a.jsonl", '{"text": " "}', "holds no text"),
    ],
)
def test_text_that_is_refused(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as refused:
        load_documents(path)
    assert said in refused.value.message
    assert path in refused.value.message
    assert refused.value.fix


def test_devices_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a device"):
        load_documents("/dev/zero")
    with pytest.raises(UserError, match="holds no text"):
        load_documents(str(tmp_path))
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="is a pipe"):
        load_documents(str(tmp_path / "pipe.txt"))


def test_c4_is_evaluated_on_its_validation_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def record(name: str, config: str | None, split: str, field: str, flag: str, data_files: dict[str, str]) -> Any:
        asked.append((name, split, data_files))
        return ["x"]

    monkeypatch.setattr(documents, "_load_dataset", record)
    for split in ("train", "validation", "test"):
        load_documents("c4", split=split)
    assert [split for _, split, _ in asked] == ["train", "validation", "validation"]
    assert all(split in files[split] for _, split, files in asked)
    assert read_split("c4", "test") == "validation"
    assert read_split("stdlib", "test") == "test"


def test_a_file_comes_before_the_set_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_named("c4")
    Path("c4").write_text("mine")
    assert not is_named("c4")
    assert read_split("c4", "test") == "test"
    assert load_documents("c4", split="test") == ["mine"]


@pytest.mark.parametrize("data", ["c4", "stdlib", "datasets:x", "here.txt"])
def test_an_unknown_split_is_refused(data: str) -> None:
    with pytest.raises(UserError, match="unknown split 'tset'"):
        load_documents(data, split="tset")
