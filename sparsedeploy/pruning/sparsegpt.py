"""SparseGPT: one-shot pruning with optimal-brain-surgeon updates of the surviving weights.

Frantar and Alistarh, ICML 2023, arXiv 2301.00774, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsedeploy.calibration.statistics import InputStatistics
from sparsedeploy.checkpoint.recipe import Modifier
from sparsedeploy.errors import UserError
from sparsedeploy.linear_algebra import add_product, all_finite, upper_cholesky_
from sparsedeploy.masks import apply_mask
from sparsedeploy.options import Options, option
from sparsedeploy.plan import NM, ModuleTarget
from sparsedeploy.pruning.base import Pruned
from sparsedeploy.pruning.selection import keep_all_but_smallest, keep_largest
from sparsedeploy.registry import PRUNERS

_RETRIES = 3
# Columns that are updated one by one before a matrix product takes over.
_LEAF = 16


@dataclass(frozen=True)
class SparseGPTOptions(Options):
    """How the Hessian is damped, and in which blocks columns are pruned."""

    damping: float = option(
        0.01,
        "Share of the Hessian's mean diagonal that is added to it; times 10 on each failed factorisation.",
        above=0,
    )
    block: int = option(
        128, "Columns that are selected and updated together; a multiple of M for N:M patterns.", at_least=1
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


@PRUNERS.register("sparsegpt", SparseGPTOptions, needs="hessian", llmcompressor=_MODIFIER)
def sparsegpt(
    weight: torch.Tensor, statistics: InputStatistics | None, target: ModuleTarget, options: SparseGPTOptions
) -> Pruned:
    """Drop weights by W^2 / U_jj^2 block by block and let the survivors make up for it (Frantar & Alistarh 2023)."""
    assert statistics is not None
    if options.damping not in statistics.memo:
        statistics.memo[options.damping] = hessian_factor(statistics.consume_hessian(), options.damping, target.name)
    factor, dead = statistics.memo[options.damping]
    solved, mask, loss = solve(weight, factor, dead, target, options.block)
    # The cast may not revive a pruned weight, and the mask, not the value, says what is pruned.
    return Pruned(mask, apply_mask(solved.to(weight.dtype), mask), loss)


def hessian_factor(hessian: torch.Tensor, damping: float, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper triangular ``R`` of the damped Hessian, ``H = R R^T``, and the dead inputs.

    Its inverse ``U`` is the upper Cholesky factor of the inverse Hessian, ``H^-1 = U^T U``.

    Args:
        hessian: ``[columns, columns]``, of which the upper triangle is read; not changed.

    Returns:
        ``R [columns, columns]`` and bool ``[columns]``, True for inputs that were zero on every token.

    Raises:
        UserError: the Hessian is not positive definite even with 1000 times the damping.
    """
    dead = hessian.diagonal() == 0
    diagonal = hessian.diagonal().masked_fill(dead, 1)
    mean = diagonal.mean().item()
    step = damping
    for _ in range(_RETRIES + 1):
        damped = hessian.triu()
        damped.diagonal().copy_(diagonal + step * mean)
        # No pivot may be so small that a block's inverse overflows.
        if upper_cholesky_(damped) and all_finite(damped) and all_finite(damped.diagonal().reciprocal()):
            return damped, dead
        del damped
        step *= 10
    raise UserError(
        f"the Hessian of {name} cannot be factorised, even with damping {step / 10:g}",
        "Use more calibration sequences, or --method wanda.",
    )


def solve(
    weight: torch.Tensor, factor: torch.Tensor, dead: torch.Tensor, target: ModuleTarget, block: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The OBS sweep over column blocks, left to right.

    In the paper's terms W_out = W_in - E U, so that sum E^2 = tr(dW H dW^T): the reported loss 1/2 sum E^2 is the
    damped squared output error per sequence. With R = U^-1 and D = W_in - W_out the same is E = D R, which needs no
    inverse of the whole Hessian: what the blocks so far changed, D, weighs on a block B by D R[:, B], and the block's
    best answer to it, were nothing in it pruned, is W_in + D R[:, B] R[B, B]^-1. From there on it is the paper's sweep.

    Args:
        weight: ``[rows, columns]``; not changed.
        factor: ``R`` of :func:`hessian_factor`, in the type to compute in.
        dead: inputs that never fired; they are pruned first.

    Returns:
        The new weight (zero where pruned), the mask (True where kept) and the loss.

    Raises:
        UserError: an N:M pattern whose M does not divide ``block``.
    """
    pattern = target.pattern
    check_block(pattern, block)
    columns = weight.shape[1]
    new = weight.to(factor.dtype, copy=True)
    new[:, dead] = 0
    mask = torch.empty_like(new, dtype=torch.bool)
    # Of blocks to come, how the changes so far weigh on them; of blocks that are done, their own change.
    change = torch.zeros_like(new)
    squared_error = torch.zeros((), dtype=torch.float64, device=new.device)

    def solve_block(start: int, end: int) -> None:
        span = slice(start, end)
        inverse = _upper_inverse(factor[span, span])
        before = new[:, span].clone()
        current = before.addmm(change[:, span], inverse)
        count = None
        if pattern is None:
            # The plan's exact count, spread over the blocks so that every prefix is within one weight of its share.
            count = target.zeros * end // columns - target.zeros * start // columns
        new[:, span], mask[:, span], errors = _solve_block(current, inverse, dead[span], pattern, count)
        squared_error.add_(errors.square_().sum(dtype=torch.float64))
        torch.sub(before, new[:, span], out=change[:, span])

    def pass_on(start: int, middle: int, end: int) -> None:
        add_product(change[:, middle:end], change[:, start:middle], factor[start:middle, middle:end])

    _in_order(_bounds(0, columns, block), solve_block, pass_on)
    return new, mask, squared_error.item() / 2


def _solve_block(
    weight: torch.Tensor, factor: torch.Tensor, dead: torch.Tensor, pattern: NM | None, count: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sweep within one block: the new weight, the mask and the errors ``[columns, rows]``.

    Args:
        weight: ``[rows, columns]`` of the block, as the blocks before it want it.
        factor: the upper triangular ``U`` of these columns.
        count: zeros of the whole block; None with a pattern.
    """
    # Transposed, so that a column's weights of all rows lie side by side: every step below runs over whole cache lines.
    new = weight.T.contiguous()
    mask = torch.empty_like(new, dtype=torch.bool)
    if count is not None:
        mask = _select_block(new, factor.diagonal(), dead, count)
    errors = torch.empty_like(new)
    # A group of M is chosen as a whole, so no leaf may cut one.
    leaf = _LEAF if pattern is None else max(_LEAF // pattern.m, 1) * pattern.m

    def sweep(first: int, last: int) -> None:
        _sweep(new, mask, errors, factor, dead, first, last, pattern)

    def pass_on(first: int, middle: int, last: int) -> None:
        add_product(new[middle:last], factor[first:middle, middle:last].T, errors[first:middle], -1)

    _in_order(_bounds(0, len(new), leaf), sweep, pass_on)
    return new.T, mask.T, errors


def _upper_inverse(factor: torch.Tensor) -> torch.Tensor:
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity, upper=True)


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


def _in_order(bounds: list[int], visit: Callable[[int, int], None], pass_on: Callable[[int, int, int], None]) -> None:
    """Visit the parts from left to right; ``pass_on`` brings what the left half did to the right half.

    By halves: each time it is one product, as large as it can be.
    """
    if len(bounds) == 2:
        visit(bounds[0], bounds[1])
        return
    half = len(bounds) // 2
    _in_order(bounds[: half + 1], visit, pass_on)
    pass_on(bounds[0], bounds[half], bounds[-1])
    _in_order(bounds[half:], visit, pass_on)


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
    """Go through columns ``first`` to ``last`` one by one; fills their rows of ``errors``.

    Args:
        factor: the upper triangular ``U`` of these columns.
    """
    step = last - first if pattern is None else pattern.m
    for start in range(first, last, step):
        group = slice(start, start + step)
        if pattern is not None:
            mask[group] = keep_largest(_scores(new[group], factor.diagonal()[group], dead[group]), pattern.n)
        kept = mask[group].to(new.dtype)
        # Where a weight goes 1 / U_jj, where it stays 0: what turns a column into its error.
        scale = (1 - kept).div_(factor.diagonal()[group, None])
        for j in range(start, start + step):
            error = torch.mul(new[j], scale[j - start], out=errors[j])
            new[j + 1 : last].addr_(factor[j, j + 1 : last], error, alpha=-1)
        new[group].mul_(kept)


def _select_block(new: torch.Tensor, diagonal: torch.Tensor, dead: torch.Tensor, count: int) -> torch.Tensor:
    """The mask of a block ``[columns, rows]`` without its ``count`` smallest scores; ties by row, then column."""
    scores = _scores(new, diagonal, dead).T.contiguous()
    return keep_all_but_smallest(scores.reshape(1, -1), count).reshape(scores.shape).T


def _scores(new: torch.Tensor, diagonal: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """W^2 / U_jj^2 ``[columns, rows]``, the error of dropping each weight; dead inputs cost less than anything."""
    scores = (new / diagonal[:, None]).square()
    scores[dead] = -1
    return scores
