"""The sampler: private, seeded, exact lengths; text that is missing, empty or too short."""

import json
import random
from pathlib import Path

import pytest

from sparsedeploy.calibration.documents import load_documents
from sparsedeploy.calibration.samples import CalibrationSet, sample_tokens
from sparsedeploy.errors import UserError
from tests.small_models import byte_tokenizer

TEXT = "".join(chr(97 + (i * i) % 26) for i in range(3000))


def draw(documents: list[str], *, length: int = 16, seed: int = 0, sequences: int = 5) -> CalibrationSet:
    return sample_tokens(documents, byte_tokenizer(), sequences=sequences, length=length, seed=seed, data="here")


def test_same_seed_same_tokens_and_the_global_generator_is_left_alone() -> None:
    random.seed(5)
    before = random.getstate()
    first = draw([TEXT])
    assert random.getstate() == before
    assert draw([TEXT]).fingerprint == first.fingerprint
    assert draw([TEXT], seed=1).fingerprint != first.fingerprint
    assert first.tokens.shape == (5, 16)


def test_windows_are_text_of_one_document() -> None:
    tokenizer = byte_tokenizer()
    windows = draw([TEXT, "short"]).tokens
    assert all(tokenizer.decode(window) in TEXT for window in windows)


def test_the_last_token_is_reachable() -> None:
    document = "abcdefgh"
    ends = {byte_tokenizer().decode(window)[-1] for window in draw([document], length=7, sequences=40).tokens}
    assert ends == {"g", "h"}


def test_short_documents_are_joined() -> None:
    assert draw(["abc", "defg", "hijklmn"], length=10).tokens.shape == (5, 10)


def test_too_short_text_is_refused() -> None:
    with pytest.raises(UserError, match="3 tokens, fewer than one sequence of 16"):
        draw(["abc"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("bad.jsonl", b'{"text": "a"}\n{oops', "line 2 is not valid JSON"),
        ("field.jsonl", b'{"body": "a"}', "neither 'text' nor 'instruction' and 'output' .it has body"),
        ("binary.txt", b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_documents(str(tmp_path / name))


def test_missing_text_names_the_forms() -> None:
    with pytest.raises(UserError, match=r"no text at 'nowhere.txt'\. Give a text file"):
        load_documents("nowhere.txt")


def test_folders_and_jsonl(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in ("one", "two")))
    assert load_documents(str(tmp_path), field="body") == ["one", "two", "second"]
