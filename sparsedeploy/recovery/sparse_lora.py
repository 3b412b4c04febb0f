"""Plain Sparse LoRA on a model that is pruned already, merged under its mask: LoSA's baseline.

Huang et al., ICLR 2025, arXiv 2502.14816: y = W x + (alpha / 8) ((B A) * M) x with a fixed mask M.
"""

from __future__ import annotations

import torch

from sparsedeploy.recovery.adapters import merged
from sparsedeploy.recovery.base import Recovered, RecoveryJob
from sparsedeploy.recovery.low_rank_training import LoraOptions, summary, train_on_pruned
from sparsedeploy.registry import RECOVERIES


@RECOVERIES.register("sparse-lora", LoraOptions, starts_from="pruned", trains=True, calibrates=False)
def sparse_lora(job: RecoveryJob, options: LoraOptions) -> Recovered:
    """Train adapters under the fixed mask and merge them: no nonzero is added, inference costs nothing."""
    adapters, masks, report = train_on_pruned(job, options, masked=True)
    with torch.no_grad():
        for name, linear in job.linears.items():
            linear.weight.data.copy_(merged(linear.weight.data, adapters[name], masks[name]))
    assert job.plan is not None
    return Recovered(job.plan, masks, {}, summary(report))
