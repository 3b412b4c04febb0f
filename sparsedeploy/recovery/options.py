"""Which text is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsedeploy.errors import UserError
from sparsedeploy.options import Options, option, seed_option

# What training minimises: the text's own tokens, the dense model's predictions, or both.
Loss = Literal["ce", "kl", "both"]


@dataclass(frozen=True)
class DataOptions(Options):
    """Which text is trained on."""

    data: str = option(
        "",
        "Text to train on: a .jsonl of text or instruction rows, or what --data takes.",
        flag="--train-data",
        reads=True,
    )
    field: str = option("text", "Text column of training rows and data sets.", flag="--train-field")
    samples: int = option(
        10_000, "Maximum number of training sequences, drawn with the seed.", flag="--train-samples", at_least=1
    )
    max_length: int = option(
        1024,
        "Longest training sequence, in tokens: rows are cut there, plain text is cut into pieces.",
        flag="--train-length",
        at_least=2,
    )
    min_length: int = option(
        8, "Minimum length of a training sequence; shorter ones are left out.", flag="--train-min-length", at_least=2
    )
    seed: int = seed_option("Seed of the choice of training sequences.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_length > self.max_length:
            raise UserError(
                f"the minimum training length {self.min_length} is above the maximum {self.max_length}",
                "Use a minimum that is not above the maximum.",
            )
