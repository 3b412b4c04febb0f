"""Text that is printed token by token."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsedeploy.errors import UserError
from sparsedeploy.runtimes.text import TextTools, load_text_tools
from tests.runtimes.artifacts import describe, write_folder
from tests.small_models import byte_tokenizer


def test_pieces_join_to_the_text_and_no_character_is_cut() -> None:
    tools = TextTools(byte_tokenizer(), [], 259)
    text = "naïve – 文"
    tokens = tools.encode(text)
    pieces = [tools.next_piece(tokens[: count + 1]) for count in range(len(tokens))]
    assert len(tokens) == len(text.encode())
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)


def test_incomplete_character_at_the_end_is_not_lost() -> None:
    tools = TextTools(byte_tokenizer(), [], 259)
    tokens = tools.encode("a文")[:-1]
    pieces = [tools.next_piece(tokens[: count + 1]) for count in range(len(tokens))]
    assert pieces == ["a", "", ""]
    assert tools.last_piece(tokens) == "\N{REPLACEMENT CHARACTER}"


def test_stop_tokens_come_from_the_generation_settings_else_the_tokenizer(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", describe(vocab=300))
    byte_tokenizer().save_pretrained(folder)
    assert load_text_tools(folder).stop == [257]
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load_text_tools(folder).stop == [5, 6]


def test_artifact_without_a_tokenizer(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", describe())
    with pytest.raises(UserError, match=r"has no tokenizer"):
        load_text_tools(folder)
    with pytest.raises(UserError, match=r"is not an exported artifact"):
        load_text_tools(tmp_path)


@pytest.mark.parametrize("eos", ['"5"', "true", "1.5", "[5, null]", "[[5]]", "{}"])
def test_stop_tokens_that_are_none(eos: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", describe(vocab=300))
    byte_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {eos}}}')
    with pytest.raises(UserError, match=r"'eos_token_id' is not a token, nor a list of them\. Export"):
        load_text_tools(folder)


def test_prompts_that_no_model_takes() -> None:
    """Nothing, and a token that the model has no row for."""
    with pytest.raises(UserError, match=r"the prompt holds no tokens\. Write some text"):
        TextTools(byte_tokenizer(), [], 259).encode("")
    with pytest.raises(UserError, match=r"the prompt is not UTF-8 text\. Set"):
        TextTools(byte_tokenizer(), [], 259).encode("a\udcffb")
    with pytest.raises(UserError, match=r"turns the text of 'the prompt' into token 257, the model has 257"):
        TextTools(byte_tokenizer(), [], 257).encode("a</s>")
