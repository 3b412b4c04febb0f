"""The best weights for a given mask: least squares on its support, by preconditioned conjugate gradients.

The error of a layer is f(W) = 1/2 tr((W - W0) H (W - W0)^T), with the damped Hessian H of its inputs. Where only the
kept weights of W may change, f is a least-squares problem of its own in each row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sparsedeploy.calibration.statistics import InputStatistics
from sparsedeploy.errors import UserError
from sparsedeploy.linear_algebra import all_finite
from sparsedeploy.masks import apply_mask
from sparsedeploy.pruning.base import Pruned

DAMPING = 0.01
ITERATIONS = 30
_MEMO = "scaled Hessian"


@dataclass(frozen=True)
class ScaledHessian:
    """A damped Hessian with its diagonal scaled to 1, which is what Jacobi preconditioning does.

    Attributes:
        matrix: ``[columns, columns]``, symmetric, of unit diagonal.
        scale: ``[columns]``; a weight times its scale is the variable of the scaled problem.
        dead: bool ``[columns]``, inputs that were zero on every token.
    """

    matrix: torch.Tensor
    scale: torch.Tensor
    dead: torch.Tensor


def scale_hessian(hessian: torch.Tensor, damping: float = DAMPING) -> ScaledHessian:
    """Damp a symmetric ``hessian [columns, columns]`` by a share of its mean diagonal, as SparseGPT does, and scale it.

    A dead input stays apart from all others: its row and column are those of the identity.
    """
    dead = hessian.diagonal() == 0
    diagonal = hessian.diagonal().masked_fill(dead, 1)
    diagonal = diagonal + damping * diagonal.mean()
    scale = diagonal.sqrt()
    matrix = hessian / scale / scale[:, None]
    matrix.diagonal().fill_(1)
    return ScaledHessian(matrix, scale, dead)


def shared_hessian(statistics: InputStatistics, damping: float = DAMPING) -> ScaledHessian:
    """:func:`scale_hessian` of an input, made once for all linears that read it."""
    key = (_MEMO, damping)
    if key not in statistics.memo:
        statistics.memo[key] = scale_hessian(statistics.hessian, damping)
    found: ScaledHessian = statistics.memo[key]
    return found


def conjugate_gradients(
    dense: torch.Tensor,
    start: torch.Tensor,
    mask: torch.Tensor,
    matrix: torch.Tensor,
    *,
    iterations: int = ITERATIONS,
    tolerance: float = 1e-4,
) -> tuple[torch.Tensor, float, float]:
    """Lower 1/2 tr((X - dense) matrix (X - dense)^T) over the kept entries of X, all rows at once.

    Each row has its own step lengths, so that it is the conjugate gradient method on that row: the error falls in
    every iteration.

    Args:
        dense, start: ``[rows, columns]`` in the scaled variables; ``start`` is zero where the mask is False.
        mask: bool ``[rows, columns]``.
        matrix: of :class:`ScaledHessian`.
        tolerance: stop when all rows' residuals are this share of the right-hand side's norm, or smaller; 0 never does.

    Returns:
        The solution, and the error of ``start`` and of the solution.
    """
    kept = mask.to(dense.dtype)
    x = start.clone()
    lost = dense - x
    gradient = lost @ matrix
    before = _half_sum(lost, gradient)
    if not iterations:
        return x, before, before
    residual = gradient.mul_(kept)
    enough: torch.Tensor | float = 0.0
    if tolerance:
        enough = tolerance**2 * (dense @ matrix).mul_(kept).square().sum(dim=1, keepdim=True)
    direction = residual.clone()
    squared = residual.square().sum(dim=1, keepdim=True)
    gained = torch.zeros((), dtype=torch.float64, device=dense.device)
    for _ in range(iterations):
        going = squared > enough
        if not bool(going.any()):
            break
        product = (direction @ matrix).mul_(kept)
        curvature = (direction * product).sum(dim=1, keepdim=True)
        step = torch.where(going & (curvature > 0), squared / curvature, 0)
        x.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        gained += 0.5 * (step * squared).sum(dtype=torch.float64)
        after = residual.square().sum(dim=1, keepdim=True)
        direction.mul_(torch.where(going, after / squared, 0)).add_(residual)
        squared = after
    return x, before, before - gained.item()


def reconstruct(
    weight: torch.Tensor,
    mask: torch.Tensor,
    hessian: ScaledHessian,
    *,
    start: torch.Tensor | None = None,
    iterations: int = ITERATIONS,
    tolerance: float = 1e-4,
) -> tuple[torch.Tensor, float]:
    """The weights on ``mask`` that lose least of the layer's output, and their error.

    Args:
        weight: dense ``[rows, columns]``; not changed.
        mask: bool, True where kept; columns of dead inputs become zero.
        start: weights on the mask to begin with, in place of the dense ones; the answer is never worse than them.

    Returns:
        The weight in the Hessian's type, zero where the mask is False, and f as SparseGPT reports it.
    """
    kind = hessian.matrix.dtype
    live = (~hessian.dead).to(kind) * hessian.scale
    dense = weight.to(kind) * live
    begin = (weight if start is None else start).to(kind) * live * mask
    found, _, error = conjugate_gradients(
        dense, begin, mask, hessian.matrix, iterations=iterations, tolerance=tolerance
    )
    return found / hessian.scale, error


def reconstructed(pruned: Pruned, weight: torch.Tensor, hessian: ScaledHessian, name: str) -> Pruned:
    """A pruner's result with its weights replaced by the best ones for its mask.

    Args:
        weight: the dense weight.
        name: of the module, for messages.

    Raises:
        UserError: a result that is not finite.
    """
    best, error = reconstruct(weight, pruned.mask, hessian, start=pruned.weight)
    cast = best.to(pruned.weight.dtype)
    if not (math.isfinite(error) and all_finite(cast)):
        raise UserError(
            f"the least-squares weights of {name} are not finite",
            "Use more calibration sequences, or leave --reconstruct out.",
        )
    return Pruned(pruned.mask, apply_mask(cast, pruned.mask), error)


def _half_sum(left: torch.Tensor, right: torch.Tensor) -> float:
    return 0.5 * (left * right).sum(dtype=torch.float64).item()
