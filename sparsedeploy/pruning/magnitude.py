"""Magnitude pruning: the smallest absolute weights go. The data-free baseline.

Han et al., NeurIPS 2015, arXiv 1506.02626, section 3: w = 0 where |w| is below a threshold; here the threshold is the
one that meets the budget exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from sparsedeploy.calibration.statistics import InputStatistics
from sparsedeploy.checkpoint.recipe import Modifier
from sparsedeploy.masks import apply_mask
from sparsedeploy.options import Options, option
from sparsedeploy.plan import ModuleTarget
from sparsedeploy.pruning.base import Pruned
from sparsedeploy.pruning.selection import keep_all_but_smallest, keep_by_target
from sparsedeploy.registry import PRUNERS


@dataclass(frozen=True)
class MagnitudeOptions(Options):
    """Which weights compete."""

    scope: Literal["matrix", "row"] = option(
        "matrix",
        "Weights compete within the whole matrix (as in the Wanda paper's baseline) or within each output row.",
    )


_MODIFIER = Modifier(
    "MagnitudePruningModifier",
    by_tensor=True,
    note="""\
# oneshot of llm-compressor 0.14 makes magnitude masks but never applies them; they need its training loop.
""",
    unusable="its oneshot makes magnitude masks but never applies them",
)


@PRUNERS.register("magnitude", MagnitudeOptions, needs="none", llmcompressor=_MODIFIER)
def magnitude(
    weight: torch.Tensor, statistics: InputStatistics | None, target: ModuleTarget, options: MagnitudeOptions
) -> Pruned:
    """Drop the smallest |W|; needs no data (Han et al. 2015)."""
    scores = weight.float().abs()
    if target.pattern is not None or options.scope == "row":
        mask = keep_by_target(scores, target)
    else:
        mask = keep_all_but_smallest(scores.reshape(1, -1), target.zeros).reshape(scores.shape)
    return Pruned(mask, apply_mask(weight, mask))
