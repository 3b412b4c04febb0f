"""The standard-library corpus: the same text every time, and no text in two splits."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsedeploy.errors import UserError
from sparsedeploy.reference.corpus import fingerprint, read_corpus, split_of, stdlib_documents

LINE = "value = some_function(argument)\n"


def write_sources(root: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((f"# file {number}\n" + LINE * 20).encode())


def test_splits_are_disjoint_and_sized() -> None:
    documents = read_corpus()
    sizes = {split: sum(len(text) for text in stdlib_documents(split)) for split in ("train", "validation", "test")}
    assert len({document.text for document in documents}) == len(documents)
    assert len({document.path for document in documents}) == len(documents)
    total = sum(sizes.values())
    assert total > 5_000_000
    assert 0.03 < sizes["validation"] / total < 0.12
    assert 0.03 < sizes["test"] / total < 0.12


def test_corpus_does_not_depend_on_the_order_of_the_file_system(tmp_path: Path) -> None:
    names = [f"module_{number}.py" for number in range(30)] + ["package/inner.py"]
    write_sources(tmp_path / "a", names)
    for name in reversed(names):  # made in another order, so listed in another order on most file systems
        path = tmp_path / "b" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((tmp_path / "a" / name).read_bytes())
    first, second = read_corpus(tmp_path / "a"), read_corpus(tmp_path / "b")
    assert first == second
    assert [document.path for document in first] == sorted(names)
    assert fingerprint(first) == fingerprint(second)


def test_tests_caches_and_machine_files_are_left_out(tmp_path: Path) -> None:
    unwanted = ["test/test_a.py", "pkg/tests/b.py", "site-packages/c.py", "_sysconfigdata_linux.py", "encodings/cp1.py"]
    write_sources(tmp_path, ["kept.py", "pkg/kept.py", *unwanted])
    assert [document.path for document in read_corpus(tmp_path)] == ["kept.py", "pkg/kept.py"]


def test_newlines_encodings_and_copies(tmp_path: Path) -> None:
    (tmp_path / "dos.py").write_bytes((LINE * 20).replace("\n", "\r\n").encode())
    (tmp_path / "copy_of_dos.py").write_bytes((LINE * 20).encode())
    (tmp_path / "latin.py").write_bytes(("# -*- coding: latin-1 -*-\n# caf\xe9\n" + LINE * 20).encode("latin-1"))
    (tmp_path / "broken.py").write_bytes(b"# \xff\xfe\n" + LINE.encode() * 20)
    documents = {document.path: document.text for document in read_corpus(tmp_path)}
    assert documents == {
        "copy_of_dos.py": LINE * 20,
        "latin.py": "# -*- coding: latin-1 -*-\n# caf\xe9\n" + LINE * 20,
    }


def test_fingerprint_sees_every_part(tmp_path: Path) -> None:
    write_sources(tmp_path, ["one.py", "two.py"])
    before = fingerprint(read_corpus(tmp_path))
    with open(tmp_path / "two.py", "a", encoding="utf-8") as file:
        file.write("x = 1\n")
    after = fingerprint(read_corpus(tmp_path))
    (tmp_path / "two.py").rename(tmp_path / "three.py")
    assert len({before, after, fingerprint(read_corpus(tmp_path))}) == 3


def test_a_file_keeps_its_split_whatever_else_there_is() -> None:
    # Published results name the held-out files, so the assignment must never move.
    assert split_of("subprocess.py") == "validation"
    assert split_of("locale.py") == "test"
    assert split_of("pydoc_data/topics.py") == "train"


def test_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="train, validation, test"):
        stdlib_documents("dev")  # type: ignore[arg-type]
