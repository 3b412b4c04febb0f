"""Plain Sparse LoRA and LoRA on a model that is pruned already (methods 8): LoSA's baselines."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsedeploy.models.low_rank import LowRank
from sparsedeploy.recovery.adapters import Adapter, merged
from sparsedeploy.recovery.base import Recovered, RecoveryJob, check_masks
from sparsedeploy.recovery.registry import RECOVERIES
from sparsedeploy.recovery.training import TrainingReport, train_adapters


@dataclass(frozen=True)
class LoraOptions:
    """Options.

    Attributes:
        rank: of every adapter; the output is scaled by alpha / 8 whatever the rank.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1 or self.alpha <= 0:
            raise ValueError("rank must be at least 1, dropout in [0, 1) and alpha positive")


@RECOVERIES.register("sparse-lora", LoraOptions, starts_from="pruned", trains=True, calibrates=False)
def sparse_lora(job: RecoveryJob, options: LoraOptions) -> Recovered:
    """Train adapters under the fixed mask and merge them: no nonzero is added, inference costs nothing."""
    adapters, masks, report = _train(job, options, masked=True)
    with torch.no_grad():
        for name, linear in job.linears.items():
            linear.weight.data.copy_(merged(linear.weight.data, adapters[name], masks[name]))
    assert job.plan is not None
    return Recovered(job.plan, masks, {}, _summary(report))


@RECOVERIES.register("lora", LoraOptions, starts_from="pruned", trains=True, calibrates=False)
def lora(job: RecoveryJob, options: LoraOptions) -> Recovered:
    """Train plain LoRA adapters and keep them apart, since merging would make the model dense again."""
    adapters, masks, report = _train(job, options, masked=False)
    assert job.plan is not None
    factors = {name: LowRank(each.a.detach(), each.b.detach(), each.scale) for name, each in adapters.items()}
    return Recovered(job.plan, masks, {}, _summary(report), factors)


def _train(
    job: RecoveryJob, options: LoraOptions, *, masked: bool
) -> tuple[dict[str, Adapter], dict[str, torch.Tensor], TrainingReport]:
    data, masks, linears = job.training_data(), job.masks or {}, job.linears
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
    report = train_adapters(
        job.model,
        adapters,
        data.sequences,
        job.training,
        seed=job.seed * 1009,
        description=f"train ({kind})",
        state=job.state,
        tag=kind,
    )
    return adapters, masks, report


def _summary(report: TrainingReport) -> dict[str, float]:
    return {
        "tokens": report.tokens,
        "seconds": report.seconds,
        "first_loss": report.losses[0],
        "last_loss": report.losses[-1],
    }
