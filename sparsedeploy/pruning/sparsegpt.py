"""SparseGPT: one-shot pruning with optimal-brain-surgeon updates of the surviving weights (methods 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsedeploy.calibration.statistics import InputStatistics
from sparsedeploy.errors import UserError
from sparsedeploy.plan import NM, ModuleTarget
from sparsedeploy.pruning.base import PRUNERS, Pruned, apply_mask
from sparsedeploy.pruning.patterns import keep_all_but_smallest, keep_largest
from sparsedeploy.pruning.products import subtract_product, triangular_inverse

_RETRIES = 3
# Columns that are updated one by one before a matrix product takes over.
_LEAF = 16


@dataclass(frozen=True)
class SparseGPTOptions:
    """Options.

    Attributes:
        damping: share of the Hessian's mean diagonal that is added to it; times 10 on each failed factorisation.
        block: columns that are selected and updated together; a multiple of M for N:M patterns.
    """

    damping: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        if self.damping <= 0 or self.block < 1:
            raise ValueError("damping and block must be positive")


@PRUNERS.register("sparsegpt", SparseGPTOptions, needs="hessian")
def sparsegpt(
    weight: torch.Tensor, statistics: InputStatistics | None, target: ModuleTarget, options: SparseGPTOptions
) -> Pruned:
    """Drop weights by W^2 / U_jj^2 block by block and let the survivors make up for it (Frantar & Alistarh 2023)."""
    assert statistics is not None
    if options.damping not in statistics.memo:
        statistics.memo[options.damping] = inverse_factor(statistics.hessian, options.damping, target.name)
    factor, dead = statistics.memo[options.damping]
    solved, mask, loss = solve(weight.float(), factor, dead, target, options.block)
    # The cast may not revive a pruned weight, and the mask, not the value, says what is pruned.
    return Pruned(mask, apply_mask(solved.to(weight.dtype), mask), loss)


def inverse_factor(hessian: torch.Tensor, damping: float, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper Cholesky factor ``U`` of the damped inverse Hessian, ``H^-1 = U^T U``, and the dead inputs.

    Args:
        hessian: ``[columns, columns]``, symmetric; not changed.

    Returns:
        ``U [columns, columns]`` and bool ``[columns]``, True for inputs that were zero on every token.

    Raises:
        UserError: the Hessian is not positive definite even with 1000 times the damping.
    """
    dead = hessian.diagonal() == 0
    # With J the reversal: J H J = L L^T gives H^-1 = U^T U for U = J L^-1 J. One factorisation and one triangular
    # inverse, where factorising the inverse itself would cost three such steps and some digits.
    reversed_diagonal = hessian.diagonal().masked_fill(dead, 1).flip(0)
    mean = reversed_diagonal.mean().item()
    step = damping
    for _ in range(_RETRIES + 1):
        attempt = hessian.flip(0, 1)
        attempt.diagonal().copy_(reversed_diagonal + step * mean)
        lower, failed = torch.linalg.cholesky_ex(attempt)
        del attempt
        if not failed:
            upper = triangular_inverse(lower).flip(0, 1)
            if torch.isfinite(upper).all():
                return upper, dead
        step *= 10
    raise UserError(
        f"the Hessian of {name} cannot be factorised, even with damping {step / 10:g}",
        "Use more calibration sequences, or --method wanda.",
    )


def solve(
    weight: torch.Tensor, factor: torch.Tensor, dead: torch.Tensor, target: ModuleTarget, block: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The OBS sweep over column blocks, left to right.

    W_out = W_in - E U, so that sum E^2 = tr(dW H dW^T): the reported loss 1/2 sum E^2 is the damped squared output
    error per sequence.

    Args:
        weight: ``[rows, columns]`` in the type to compute in; not changed.
        factor: ``U`` of :func:`inverse_factor`.
        dead: inputs that never fired; they are pruned first.

    Returns:
        The new weight (zero where pruned), the mask (True where kept) and the loss.

    Raises:
        UserError: an N:M pattern whose M does not divide ``block``.
    """
    pattern = target.pattern
    check_block(pattern, block)
    columns = weight.shape[1]
    # Transposed, so that a column's weights of all rows lie side by side: every step below runs over whole cache lines.
    new = weight.T.contiguous()
    new[dead] = 0
    mask = torch.ones_like(new, dtype=torch.bool)
    errors = torch.zeros_like(new)
    # A group of M is chosen as a whole, so no leaf may cut one.
    leaf = _LEAF if pattern is None else max(_LEAF // pattern.m, 1) * pattern.m

    def sweep(start: int, end: int) -> None:
        _sweep(new, mask, errors, factor, dead, start, end, pattern)

    def solve_block(start: int, end: int) -> None:
        if pattern is None:
            # The plan's exact count, spread over the blocks so that every prefix is within one weight of its share.
            count = target.zeros * end // columns - target.zeros * start // columns
            mask[start:end] = _select_block(new[start:end], factor.diagonal()[start:end], dead[start:end], count)
        _in_order(_bounds(start, end, leaf), sweep, new, errors, factor)

    _in_order(_bounds(0, columns, block), solve_block, new, errors, factor)
    squared_error = errors.square_().sum(dtype=torch.float64).item()
    return new.T.contiguous(), mask.T.contiguous(), squared_error / 2


def check_block(pattern: NM | None, block: int) -> None:
    """Refuse a block that would cut a group of M.

    Raises:
        UserError: an N:M pattern whose M does not divide ``block``.
    """
    if pattern is not None and block % pattern.m:
        raise UserError(
            f"SparseGPT's block of {block} columns is not divisible by {pattern.m} (pattern {pattern})",
            f"Set the option block to a multiple of {pattern.m}.",
        )


def _bounds(start: int, end: int, step: int) -> list[int]:
    """Where the parts of ``step`` columns begin, and the end."""
    return [*range(start, end, step), end]


def _in_order(
    bounds: list[int],
    visit: Callable[[int, int], None],
    new: torch.Tensor,
    errors: torch.Tensor,
    factor: torch.Tensor,
) -> None:
    """Visit the parts from left to right, each when everything before it has been taken off its columns.

    By halves: what the errors of the left half owe to the right one is one product, as large as it can be.
    """
    if len(bounds) == 2:
        visit(bounds[0], bounds[1])
        return
    half = len(bounds) // 2
    start, middle, end = bounds[0], bounds[half], bounds[-1]
    _in_order(bounds[: half + 1], visit, new, errors, factor)
    subtract_product(new[middle:end], factor[start:middle, middle:end].T, errors[start:middle])
    _in_order(bounds[half:], visit, new, errors, factor)


def _sweep(
    new: torch.Tensor,
    mask: torch.Tensor,
    errors: torch.Tensor,
    factor: torch.Tensor,
    dead: torch.Tensor,
    first: int,
    last: int,
    pattern: NM | None,
) -> None:
    """Go through columns ``first`` to ``last`` one by one; fills their rows of ``errors``."""
    step = last - first if pattern is None else pattern.m
    for start in range(first, last, step):
        group = slice(start, start + step)
        if pattern is not None:
            mask[group] = keep_largest(_scores(new[group], factor.diagonal()[group], dead[group]), pattern.n)
        # Where a weight goes 1 / U_jj, where it stays 0: what turns a column into its error.
        scale = (~mask[group]).to(new.dtype).div_(factor.diagonal()[group, None])
        for j in range(start, start + step):
            error = torch.mul(new[j], scale[j - start], out=errors[j])
            new[j + 1 : last].addr_(factor[j, j + 1 : last], error, alpha=-1)
    new[first:last].masked_fill_(~mask[first:last], 0)


def _select_block(new: torch.Tensor, diagonal: torch.Tensor, dead: torch.Tensor, count: int) -> torch.Tensor:
    """The mask of a block ``[columns, rows]`` without its ``count`` smallest scores; ties by row, then column."""
    scores = _scores(new, diagonal, dead).T.contiguous()
    return keep_all_but_smallest(scores.reshape(1, -1), count).reshape(scores.shape).T


def _scores(new: torch.Tensor, diagonal: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """W^2 / U_jj^2 ``[columns, rows]``, the error of dropping each weight; dead inputs cost less than anything."""
    scores = (new / diagonal[:, None]).square()
    scores[dead] = -1
    return scores
