"""Which text is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparsedeploy.options import Options, option, seed_option

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CalibrationOptions(Options):
    """Which text is measured."""

    data: str = option(
        "c4", "Calibration text: file, folder, .jsonl, stdlib, c4, datasets:NAME[:CONFIG].", short="-d", reads=True
    )
    field: str = option("text", "Text field of JSONL rows and data sets.", flag="--data-field")
    sequences: int = option(128, "Calibration sequences.", flag="--samples", short="-n", at_least=1)
    length: int | None = option(
        None,
        "Tokens per sequence.",
        unset="min(2048, positions)",
        flag="--calibration-length",
        at_least=2,
    )
    seed: int = seed_option("Seed of the calibration sampler.")
    batch_size: int | None = option(
        None, "Sequences per layer call; no effect on results.", unset="by free memory", at_least=1, recorded=False
    )
    accumulate: Literal["float32", "float64"] = option(
        "float32", "Sum statistics in float32, or in float64 for bit-identical sums at any number of processes."
    )

    @property
    def accumulation(self) -> torch.dtype:
        """The type of ``accumulate``."""
        import torch

        dtype: torch.dtype = getattr(torch, self.accumulate)
        return dtype
