"""An artifact's tokenizer: text to tokens, and tokens to text piece by piece as they come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsedeploy.artifacts.description import load_artifact
from sparsedeploy.reading import read_object

# What a tokenizer puts where the bytes of a character are not complete yet.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextTools:
    """Tokenizer and stop tokens of one artifact; keeps what was printed of one generated text.

    Attributes:
        stop: ids of the tokens that end a text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.stop = list(stop)
        self._printed = 0

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a prompt, with the special tokens that the tokenizer adds."""
        from sparsedeploy.models.tokenizer import token_ids  # heavy, like transformers

        tokens: list[int] = token_ids(self.tokenizer, prompt)
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
    """The tokenizer in an artifact folder, and the stop tokens of its generation settings.

    Raises:
        UserError: not an artifact, or it holds no tokenizer.
    """
    from transformers import GenerationConfig

    # Heavy, like transformers.
    from sparsedeploy.models.tokenizer import load_tokenizer

    artifact = load_artifact(folder)
    tokenizer = load_tokenizer(Path(folder), vocabulary=artifact.shapes.vocab)
    if (Path(folder) / "generation_config.json").exists():
        read_object(Path(folder) / "generation_config.json", fix="Export the checkpoint again.")
    stop = None
    if (Path(folder) / "generation_config.json").is_file():
        stop = GenerationConfig.from_pretrained(str(folder), local_files_only=True).eos_token_id
    if stop is None:
        stop = tokenizer.eos_token_id
    return TextTools(tokenizer, [] if stop is None else [stop] if isinstance(stop, int) else stop)
