"""Wanda: weight magnitude times input norm, compared within each output row (methods 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsedeploy.calibration.scores import wanda_score_blocks
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
    mask = torch.cat([select(scores, target) for scores in wanda_score_blocks(weight, statistics.mean_square)])
    return Pruned(mask, apply_mask(weight, mask))


def select(scores: torch.Tensor, target: ModuleTarget) -> torch.Tensor:
    """The mask of some rows of the target, by the scores of their weights."""
    if target.pattern is not None:
        return keep_n_of_m(scores, target.pattern.n, target.pattern.m)
    return keep_all_but_smallest(scores, target.zeros_per_row)
