"""An artifact's tokenizer: text to tokens, and tokens to text piece by piece as they come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsedeploy.artifacts.description import load_artifact
from sparsedeploy.errors import UserError
from sparsedeploy.reading import read_object

# What a tokenizer puts where the bytes of a character are not complete yet.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextTools:
    """Tokenizer and stop tokens of one artifact; keeps what was printed of one generated text.

    Attributes:
        stop: ids of the tokens that end a text.
        vocabulary: rows of the model's embedding.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[int], vocabulary: int) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.stop = list(stop)
        self._printed = 0

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a prompt, with the special tokens that the tokenizer adds.

        Raises:
            UserError: a prompt that is not UTF-8 or has no tokens, or one that the model has no row for.
        """
        from sparsedeploy.models.tokenizer import check_tokens, token_ids  # heavy, like transformers

        try:
            prompt.encode()
        except UnicodeEncodeError:  # bytes of the command line that are no characters
            raise UserError("the prompt is not UTF-8 text", "Set the terminal to UTF-8.") from None
        tokens: list[int] = token_ids(self.tokenizer, prompt, verbose=False)
        if not tokens:
            raise UserError("the prompt holds no tokens", "Write some text to continue.")
        check_tokens(tokens, self.vocabulary, "the prompt")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def next_piece(self, tokens: Sequence[int]) -> str:
        """What the newest token adds to the text; nothing while a character is incomplete."""
        text = self.decode(tokens)
        if text.endswith(_INCOMPLETE):
            return ""
        return self._advance(text)

    def last_piece(self, tokens: Sequence[int]) -> str:
        """What :meth:`next_piece` has held back, when no more tokens come."""
        return self._advance(self.decode(tokens))

    def _advance(self, text: str) -> str:
        piece = text[self._printed :]
        self._printed = len(text)
        return piece


def load_text_tools(folder: Path) -> TextTools:
    """The tokenizer in an artifact folder, and the stop tokens of its generation settings, else its own.

    Raises:
        UserError: not an artifact, it holds no tokenizer, or its generation settings are damaged.
    """
    # Heavy, like transformers.
    from sparsedeploy.models.tokenizer import load_tokenizer

    artifact = load_artifact(folder)
    vocabulary = artifact.shapes.vocab
    tokenizer = load_tokenizer(Path(folder), vocabulary=vocabulary)
    stop = _stop_tokens(Path(folder) / "generation_config.json")
    if not stop and tokenizer.eos_token_id is not None:
        stop = [tokenizer.eos_token_id]
    return TextTools(tokenizer, stop, vocabulary)


def _stop_tokens(path: Path) -> list[int]:
    """Those that the generation settings name; empty where there are none.

    Raises:
        UserError: a file that cannot be read, or something else in their place.
    """
    if not path.exists():
        return []
    fix = "Export the checkpoint again."
    named = read_object(path, fix=fix).get("eos_token_id")
    found = [] if named is None else named if isinstance(named, list) else [named]
    if not all(type(one) is int for one in found):
        raise UserError(f"{path}: 'eos_token_id' is not a token, nor a list of them", fix)
    return found
