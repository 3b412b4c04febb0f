"""Wanda: weight magnitude times input norm, compared within each output row.

Sun et al., ICLR 2024, arXiv 2306.11695, eq. 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsedeploy.calibration.scores import wanda_score_blocks
from sparsedeploy.calibration.statistics import InputStatistics
from sparsedeploy.checkpoint.recipe import Modifier
from sparsedeploy.masks import apply_mask
from sparsedeploy.options import Options
from sparsedeploy.plan import ModuleTarget
from sparsedeploy.pruning.base import Pruned
from sparsedeploy.pruning.selection import keep_by_target
from sparsedeploy.registry import PRUNERS


@dataclass(frozen=True)
class WandaOptions(Options):
    """Wanda has no options."""


@PRUNERS.register("wanda", WandaOptions, needs="sum_squares", llmcompressor=Modifier("WandaPruningModifier"))
def wanda(
    weight: torch.Tensor, statistics: InputStatistics | None, target: ModuleTarget, options: WandaOptions
) -> Pruned:
    """Drop the smallest |W| * input norm of every row; survivors stay as they are (Sun et al. 2024)."""
    assert statistics is not None
    blocks = wanda_score_blocks(weight, statistics.mean_square)
    mask = torch.cat([keep_by_target(scores, target) for scores in blocks])
    return Pruned(mask, apply_mask(weight, mask))
