"""Kept weights of few bits: rounded in the sweep, then adjusted one by one towards the dense layer's output."""

from __future__ import annotations

import torch

from sparsedeploy.calibration.statistics import InputStatistics
from sparsedeploy.grid import Grid
from sparsedeploy.masks import apply_mask
from sparsedeploy.plan import ModuleTarget
from sparsedeploy.pruning.base import Pruned
from sparsedeploy.pruning.sweep import BLOCK, DAMPING, shared_factor, solve

PASSES = 3


def rounded(
    pruned: Pruned, weight: torch.Tensor | None, statistics: InputStatistics, target: ModuleTarget, grid: Grid
) -> Pruned:
    """A pruner's result with its kept weights rounded, on its mask.

    A method that only chooses leaves to the sweep to make up for what it drops; of one that has found new weights, the
    sweep makes up for the rounding. A result that is rounded already is only adjusted.

    Args:
        weight: the dense weight; None where it is not known, and the pruned one is what to come close to.
    """
    factor, dead = shared_factor(statistics, DAMPING, target.name, last_use=False)
    wanted = pruned.weight if weight is None else weight
    if pruned.scales is None:
        start = wanted if torch.equal(apply_mask(wanted, pruned.mask), pruned.weight) else pruned.weight
        swept = solve(start, factor, dead, target, max(BLOCK, grid.group), mask=pruned.mask, grid=grid)
        assert swept.scales is not None
        pruned = Pruned(pruned.mask, swept.weight, None, swept.scales)
    if "damped" not in statistics.memo:
        statistics.memo["damped"] = factor @ factor.T
    wanted = wanted.to(factor.dtype, copy=True)
    wanted[:, dead] = 0
    return adjusted(pruned, wanted, statistics.memo["damped"], grid)


def adjusted(pruned: Pruned, wanted: torch.Tensor, hessian: torch.Tensor, grid: Grid, passes: int = PASSES) -> Pruned:
    """Coordinate descent on 1/2 tr((W - wanted) H (W - wanted)^T) over codes and scales; the error never rises.

    Column by column each kept weight moves to the code nearest to its best value with all others held, then each
    group's scale to its own best value.

    Args:
        wanted: ``[rows, columns]``.
        hessian: ``[columns, columns]``, symmetric and positive definite.

    Returns:
        With the error as its loss; the weight is in the type of ``wanted``, in which a code times its scale is exact.
    """
    assert pruned.scales is not None
    columns = wanted.shape[1]
    # Transposed, as in the sweep: a column's weights of all rows lie side by side.
    new = pruned.weight.to(wanted.dtype).T.contiguous()
    kept = pruned.mask.T.to(wanted.dtype)
    scales = pruned.scales.T.to(wanted.dtype).contiguous()
    slope = hessian @ (new - wanted.T)
    for _ in range(passes):
        for index, first in enumerate(range(0, columns, grid.group)):
            span = slice(first, min(first + grid.group, columns))
            within = hessian[span, span]
            before, here = new[span].clone(), slope[span].clone()
            codes = _best_codes(new[span], here, within, kept[span], scales[index], grid)
            scales[index] += _better_scale(codes, here, within, scales[index])
            torch.mul(codes, scales[index], out=new[span])
            slope.addmm_(hessian[:, span], new[span] - before)
    error = 0.5 * ((new - wanted.T) * slope).sum(dtype=torch.float64).item()
    weight = apply_mask(new.T.contiguous(), pruned.mask)
    return Pruned(pruned.mask, weight, error, scales.T.to(torch.float16).contiguous())


def _best_codes(
    new: torch.Tensor,
    slope: torch.Tensor,
    within: torch.Tensor,
    kept: torch.Tensor,
    scale: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """The codes of one group ``[columns, rows]`` after a pass over its columns; ``slope`` follows."""
    codes = torch.empty_like(new)
    for j, curvature in enumerate(within.diagonal()):
        torch.mul(grid.codes(new[j] - slope[j] / curvature, scale), kept[j], out=codes[j])
        slope.addr_(within[:, j], codes[j] * scale - new[j])
    return codes


def _better_scale(codes: torch.Tensor, slope: torch.Tensor, within: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What to add to a group's scales ``[rows]``, so that the error falls and float16 holds the sum."""
    curvature = (codes * (within @ codes)).sum(dim=0)
    falling = (codes * slope).sum(dim=0)
    step = torch.where(curvature > 0, -falling / curvature, 0)
    proposed = (scale + step).to(torch.float16).to(scale.dtype)
    step = proposed - scale
    gain = step * falling + 0.5 * step.square() * curvature
    return torch.where((gain < 0) & (proposed != 0) & torch.isfinite(proposed), step, 0)
