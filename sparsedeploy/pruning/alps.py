"""ALPS: the mask by operator splitting, the weights by conjugate gradients on it.

Meng et al., NeurIPS 2024, arXiv 2406.07831: X = (H + rho I)^-1 (H W + rho (D - U)), D = P(X + U), U = U + X - D, with P
the projection onto the budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from sparsedeploy.calibration.statistics import InputStatistics
from sparsedeploy.errors import UserError
from sparsedeploy.linear_algebra import all_finite
from sparsedeploy.masks import apply_mask
from sparsedeploy.options import Options, option
from sparsedeploy.plan import ModuleTarget
from sparsedeploy.pruning.base import Pruned
from sparsedeploy.pruning.least_squares import DAMPING, conjugate_gradients, shared_hessian
from sparsedeploy.pruning.selection import keep_all_but_smallest, keep_by_target
from sparsedeploy.registry import PRUNERS

# The paper's schedule: how the penalty grows, by the share of the kept weights that changed in the last steps.
_PAPER_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
_MOST_LEVELS = 100


@dataclass(frozen=True)
class ALPSOptions(Options):
    """The penalty's schedule, the projection, and the fit on the final mask."""

    schedule: Literal["short", "paper"] = option(
        "short",
        "`short` raises the penalty from `penalty` to `last` in `levels` equal ratios, whose factorisations all "
        "linears with one input share; `paper` raises it by 1.1 to 1.3 as the mask settles, until it does not change "
        "any more: about a tenth less error for four times the work.",
    )
    penalty: float = option(0.2, "The first penalty, relative to the Hessian's scaled diagonal.", above=0)
    last: float = option(2.0, "The last penalty of the short schedule.", above=0)
    levels: int = option(3, "Number of penalties in the short schedule.", at_least=1)
    steps: int = option(3, "Steps per penalty.", at_least=1)
    relaxation: float = option(
        1.6, "Over-relaxation of the splitting; 1 is none, as in the paper.", at_least=1, below=2
    )
    scope: Literal["matrix", "row"] = option(
        "matrix", "Weights compete within the whole matrix, as in the paper, or within each output row."
    )
    iterations: int = option(2, "Conjugate gradient iterations on the final mask.", at_least=0)
    damping: float = option(
        DAMPING, "Damping: the fraction of the Hessian's mean diagonal that is added to it.", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last < self.penalty:
            raise ValueError("last must be at least penalty")


@PRUNERS.register("alps", ALPSOptions, needs="hessian")
def alps(
    weight: torch.Tensor, statistics: InputStatistics | None, target: ModuleTarget, options: ALPSOptions
) -> Pruned:
    """Choose the weights that lose least of the layer's output together, then fit them to it (Meng et al. 2024)."""
    assert statistics is not None
    hessian = shared_hessian(statistics, options.damping)
    kind = hessian.matrix.dtype
    dense = weight.to(kind) * hessian.scale
    dense[:, hessian.dead] = 0
    first = _project(dense, hessian.dead, target, options.scope)
    inverses = Inverses(hessian.matrix, statistics.memo if statistics.linears > 1 else None)
    split, mask = solve(dense, first, inverses, hessian.dead, target, options)

    def fit(start: torch.Tensor, mask: torch.Tensor, iterations: int) -> tuple[torch.Tensor, float, float]:
        return conjugate_gradients(dense, start, mask, hessian.matrix, iterations=iterations, tolerance=0)

    solved, _, error = fit(split, mask, options.iterations)
    begun = dense * first
    if not error <= fit(begun, first, 0)[2]:  # a penalty that diverged, too, is no better than where it began
        mask, (solved, _, error) = first, fit(begun, first, options.iterations)
    cast = (solved / hessian.scale).to(weight.dtype)
    if not (math.isfinite(error) and all_finite(cast)):
        raise UserError(
            f"ALPS found no finite weights for {target.name}",
            "Use more calibration sequences or a larger --method-option damping, or --method wanda.",
        )
    return Pruned(mask, apply_mask(cast, mask), error)


class Inverses:
    """(H + penalty I)^-1 by penalty, kept for the other linears that read the same input.

    Args:
        matrix: H, symmetric.
        memo: where they are kept; None keeps none.
    """

    def __init__(self, matrix: torch.Tensor, memo: dict[object, torch.Tensor] | None) -> None:
        self.matrix = matrix
        self._memo = memo

    def __call__(self, penalty: float) -> torch.Tensor:
        key = ("inverse", penalty)
        if self._memo is not None and key in self._memo:
            return self._memo[key]
        shifted = self.matrix.clone()
        shifted.diagonal().add_(penalty)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(shifted).L)
        if self._memo is not None:
            self._memo[key] = inverse
        return inverse


def solve(
    dense: torch.Tensor,
    mask: torch.Tensor,
    inverses: Inverses,
    dead: torch.Tensor,
    target: ModuleTarget,
    options: ALPSOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Alternating directions on min f(X) with X = D and D on the budget (the paper's algorithm 1).

    With the multiplier V = penalty * U, one step is X = (H + penalty I)^-1 (H dense + penalty (D - U)), then D the
    projection of X + U, and U what the projection took away. H dense enters as dense - penalty (H + penalty I)^-1
    dense, so that each step is one product.

    Args:
        dense: ``[rows, columns]``, scaled.
        mask: where to begin.

    Returns:
        D and its mask.
    """
    split, dual = dense * mask, torch.zeros_like(dense)
    penalty = options.penalty
    for _ in range(options.levels if options.schedule == "short" else _MOST_LEVELS):
        inverse = inverses(penalty)
        before = mask
        for _ in range(options.steps):
            x = torch.addmm(dense, (split - dual).sub_(dense), inverse, alpha=penalty)
            x = torch.lerp(split, x, options.relaxation).add_(dual)
            mask = _project(x, dead, target, options.scope)
            split = x * mask
            dual = x.sub_(split)
        changed = int(torch.count_nonzero(mask ^ before)) / max(target.size - target.zeros, 1)
        if changed == 0:
            break
        growth = _growth(changed, options)
        dual.div_(growth)
        penalty *= growth
    return split, mask


def _growth(changed: float, options: ALPSOptions) -> float:
    """What the penalty is multiplied by, where this share of the kept weights changed with the last one."""
    if options.schedule == "short":
        return float((options.last / options.penalty) ** (1 / max(options.levels - 1, 1)))
    return next(growth for share, growth in _PAPER_GROWTH if changed >= share)


def _project(scaled: torch.Tensor, dead: torch.Tensor, target: ModuleTarget, scope: str) -> torch.Tensor:
    """The mask of the largest entries that the target leaves; dead inputs go first."""
    scores = scaled.abs()
    if bool(dead.any()):
        scores[:, dead] = -1
    if target.pattern is not None or scope == "row":
        return keep_by_target(scores, target)
    return keep_all_but_smallest(scores.reshape(1, -1), target.zeros).reshape(scores.shape)
