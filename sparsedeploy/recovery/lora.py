"""LoRA on a model that is pruned already, kept beside its weights: LoSA's baseline.

Hu et al., ICLR 2022, arXiv 2106.09685, eq. 3.
"""

from __future__ import annotations

from sparsedeploy.models.low_rank import LowRank
from sparsedeploy.recovery.base import Recovered, RecoveryJob
from sparsedeploy.recovery.low_rank_training import LoraOptions, summary, train_on_pruned
from sparsedeploy.registry import RECOVERIES


@RECOVERIES.register("lora", LoraOptions, starts_from="pruned", trains=True, calibrates=False, merged=False)
def lora(job: RecoveryJob, options: LoraOptions) -> Recovered:
    """Train plain LoRA adapters and keep them apart, since merging would make the model dense again."""
    adapters, masks, report = train_on_pruned(job, options, masked=False)
    assert job.plan is not None
    factors = {name: LowRank(each.a.detach(), each.b.detach(), each.scale) for name, each in adapters.items()}
    return Recovered(job.plan, masks, {}, summary(report), factors)
