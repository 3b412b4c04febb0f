"""Wanda: weight magnitude times input norm, compared within each output row (methods 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsedeploy.calibration.scores import wanda_scores
from sparsedeploy.calibration.statistics import InputStatistics
from sparsedeploy.plan import ModuleTarget
from sparsedeploy.pruning.base import PRUNERS, Pruned, apply_mask
from sparsedeploy.pruning.patterns import keep_all_but_smallest, keep_n_of_m


@dataclass(frozen=True)
class WandaOptions:
    """Wanda has no options."""


@PRUNERS.register("wanda", WandaOptions, needs="sum_squares")
def wanda(
    weight: torch.Tensor, statistics: InputStatistics | None, target: ModuleTarget, options: WandaOptions
) -> Pruned:
    """Drop the smallest |W| * input norm of every row; survivors stay as they are (Sun et al. 2024)."""
    assert statistics is not None
    scores = wanda_scores(weight, statistics.mean_square)
    if target.pattern is not None:
        mask = keep_n_of_m(scores, target.pattern.n, target.pattern.m)
    else:
        mask = keep_all_but_smallest(scores, target.zeros_per_row)
    return Pruned(mask, apply_mask(weight, mask))
