"""What sparse-lora and lora share: adapters of one rank on a model that is pruned already."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsedeploy.options import Options, option
from sparsedeploy.recovery.adapters import Adapter
from sparsedeploy.recovery.base import RecoveryJob, check_masks
from sparsedeploy.recovery.training import AdapterTraining, TrainingReport


@dataclass(frozen=True)
class LoraOptions(Options):
    """The adapters."""

    rank: int = option(8, "Rank of every adapter.", at_least=1)
    alpha: float = option(16.0, "The adapters' output is scaled by alpha / 8 whatever the rank.", above=0)
    dropout: float = option(0.1, "Dropout on the adapters' inputs in training.", at_least=0, below=1)


def train_on_pruned(
    job: RecoveryJob, options: LoraOptions, *, masked: bool
) -> tuple[dict[str, Adapter], dict[str, torch.Tensor], TrainingReport]:
    masks, linears = job.masks or {}, job.linears
    check_masks(linears, masks)
    generator = torch.Generator().manual_seed(job.seed * 1009)
    adapters = {
        name: Adapter(
            linear,
            options.rank,
            masks[name] if masked else None,
            alpha=options.alpha,
            dropout=options.dropout,
            generator=generator,
        )
        for name, linear in linears.items()
    }
    kind = "sparse-lora" if masked else "lora"
    return adapters, masks, job.train(AdapterTraining(job.model, adapters), job.objective(), kind)


def summary(report: TrainingReport) -> dict[str, float]:
    return {
        "tokens": report.tokens,
        "seconds": report.seconds,
        "first_loss": report.losses[0],
        "last_loss": report.losses[-1],
    }
