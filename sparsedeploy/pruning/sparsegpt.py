"""SparseGPT: one-shot pruning with optimal-brain-surgeon updates of the surviving weights.

Frantar and Alistarh, ICML 2023, arXiv 2301.00774, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsedeploy.calibration.statistics import InputStatistics
from sparsedeploy.checkpoint.recipe import Modifier
from sparsedeploy.grid import Grid
from sparsedeploy.masks import apply_mask
from sparsedeploy.options import Options, option
from sparsedeploy.plan import ModuleTarget
from sparsedeploy.pruning.base import Pruned
from sparsedeploy.pruning.sweep import BLOCK, DAMPING, shared_factor, solve
from sparsedeploy.registry import PRUNERS


@dataclass(frozen=True)
class SparseGPTOptions(Options):
    """How the Hessian is damped, and in which blocks columns are pruned."""

    damping: float = option(
        DAMPING,
        "Damping: the fraction of the Hessian's mean diagonal added to it; times 10 on each failed factorisation.",
        above=0,
    )
    block: int = option(
        BLOCK, "Columns that are selected and updated together; a multiple of M for N:M patterns.", at_least=1
    )


_MODIFIER = Modifier(
    "SparseGPTModifier",
    arguments=lambda options: {
        "block_size": options.get("block", SparseGPTOptions.block),
        "dampening_frac": options.get("damping", SparseGPTOptions.damping),
    },
    rounds_up=True,
    note="""\
# SparseGPTModifier prunes floor(weights of a block * sparsity) + 1 weights of each block of columns, so the rates are
# just below the plan's: a block loses the plan's share, rounded up to a whole weight.
""",
)


@PRUNERS.register("sparsegpt", SparseGPTOptions, needs="hessian", rounds=True, llmcompressor=_MODIFIER)
def sparsegpt(
    weight: torch.Tensor,
    statistics: InputStatistics | None,
    target: ModuleTarget,
    options: SparseGPTOptions,
    grid: Grid | None = None,
) -> Pruned:
    """Drop weights by W^2 / U_jj^2 block by block and let the survivors make up for it (Frantar & Alistarh 2023)."""
    assert statistics is not None
    factor, dead = shared_factor(statistics, options.damping, target.name, last_use=grid is None)
    solved, mask, loss, scales = solve(weight, factor, dead, target, options.block, grid=grid)
    # The cast may not revive a pruned weight, and the mask, not the value, says what is pruned.
    return Pruned(mask, apply_mask(solved.to(weight.dtype), mask), loss, scales)
