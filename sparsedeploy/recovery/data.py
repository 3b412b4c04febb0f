"""Training text: instruction rows or plain text, tokenised, a seeded subset of it, and the slice of each LoSA step."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import torch

from sparsedeploy import progress
from sparsedeploy.calibration.documents import is_rows, load_documents
from sparsedeploy.errors import UserError
from sparsedeploy.models.tokenizer import token_ids
from sparsedeploy.recovery.options import DataOptions

_PIECES_PER_WANTED = 4


@dataclass(frozen=True)
class TrainingData:
    """Token sequences to train on.

    Attributes:
        sequences: int64 ``[length]`` each, in the order of the seeded subset.
        data: where the text came from, as the user named it.
    """

    sequences: list[torch.Tensor]
    data: str
    seed: int

    @property
    def tokens(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for sequence in self.sequences:
            digest.update(len(sequence).to_bytes(8, "big") + sequence.numpy().tobytes())
        return {
            "data": self.data,
            "sequences": len(self.sequences),
            "tokens": self.tokens,
            "seed": self.seed,
            "sha256": digest.hexdigest(),
        }


def load_training_data(tokenizer: Any, options: DataOptions) -> TrainingData:
    """Read, tokenise, select.

    A row's text ends with the end-of-text token, which is trained on; so does the last piece of a document.

    Raises:
        UserError: no data, not text, rows without the wanted fields, or nothing as long as the minimum.
    """
    rows = is_rows(options.data)
    texts = load_documents(options.data, field=options.field, flag="--train-field")
    sequences: list[torch.Tensor] = []
    order = list(range(len(texts)))
    random.Random(options.seed).shuffle(order)
    for index in progress.track(order, "tokenise training text", unit="texts"):
        ids = token_ids(tokenizer, texts[index], verbose=False)
        if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids = [*ids, tokenizer.eos_token_id]
        pieces = [ids[: options.max_length]] if rows else _pieces(ids, options.max_length)
        sequences.extend(torch.tensor(piece) for piece in pieces if len(piece) >= options.min_length)
        # Documents give many pieces: a few times what is wanted, so that the pieces come from many documents.
        if len(sequences) >= options.samples * (1 if rows else _PIECES_PER_WANTED):
            break
    if not sequences:
        raise UserError(
            f"every sequence of '{options.data}' is shorter than {options.min_length} tokens",
            "Give longer text, or lower --train-min-length.",
        )
    if not rows:  # the pieces of one document are spread over the steps
        random.Random(options.seed).shuffle(sequences)
    return TrainingData(sequences[: options.samples], options.data, options.seed)


def step_slices(count: int, steps: int, *, reference: bool = False) -> list[range]:
    """Which sequences each step trains on: a tenth for each of four steps and the rest for the last.

    Args:
        count: sequences in all.
        steps: for other numbers of steps the first ones get 1 / (2 steps) each.
        reference: the released code's slices: the first tenth is left out, the last step sees the one before's again.

    Raises:
        UserError: fewer sequences than steps need.
    """
    unit = count // (2 * steps) if steps > 1 else count
    if unit < 1 or count < 1:
        raise UserError(
            f"{count} training sequences are too few for {steps} steps",
            f"Give at least {2 * steps if steps > 1 else 1}, or use fewer steps.",
        )
    if steps == 1:
        return [range(count)]
    if reference:
        return [range(unit * t, unit * (t + 1)) for t in range(1, steps)] + [range(unit * (steps - 1), count)]
    return [range(unit * t, unit * (t + 1)) for t in range(steps - 1)] + [range(unit * (steps - 1), count)]


def _pieces(ids: list[int], length: int) -> list[list[int]]:
    return [ids[start : start + length] for start in range(0, len(ids), length)]
