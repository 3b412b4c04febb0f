"""The optimal-brain-surgeon sweep over columns: what is dropped or rounded, the columns to come make up for.

Dropping is SparseGPT's (Frantar and Alistarh, ICML 2023, arXiv 2301.00774, algorithm 1), rounding GPTQ's (Frantar et
al., ICLR 2023, arXiv 2210.17323, algorithm 1); one sweep does both, as section 3.5 of the former describes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from sparsedeploy.calibration.statistics import InputStatistics
from sparsedeploy.errors import UserError
from sparsedeploy.grid import Grid
from sparsedeploy.linear_algebra import add_product, all_finite, upper_cholesky_
from sparsedeploy.plan import NM, ModuleTarget
from sparsedeploy.pruning.selection import keep_all_but_smallest, keep_largest

DAMPING = 0.01
BLOCK = 128

_RETRIES = 3
# Columns that are updated one by one before a matrix product takes over.
_LEAF = 16


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


def shared_factor(
    statistics: InputStatistics, damping: float, name: str, *, last_use: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`hessian_factor` of an input, made once for all linears that read it.

    Args:
        last_use: nobody reads the Hessian after this, so the factor takes its memory.
    """
    key = ("factor", damping)
    if key not in statistics.memo:
        hessian = statistics.consume_hessian() if last_use else statistics.hessian
        statistics.memo[key] = hessian_factor(hessian, damping, name)
    found: tuple[torch.Tensor, torch.Tensor] = statistics.memo[key]
    return found


class Swept(NamedTuple):
    """What a sweep gives.

    Attributes:
        weight: ``[rows, columns]``, zero where pruned.
        mask: bool ``[rows, columns]``, True where kept.
        loss: 1/2 tr(dW H dW^T).
        scales: float16 ``[rows, groups]``; None where nothing was rounded.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    loss: float
    scales: torch.Tensor | None


def solve(
    weight: torch.Tensor,
    factor: torch.Tensor,
    dead: torch.Tensor,
    target: ModuleTarget,
    block: int,
    *,
    mask: torch.Tensor | None = None,
    grid: Grid | None = None,
) -> Swept:
    """The OBS sweep over column blocks, left to right.

    In the paper's terms W_out = W_in - E U, so that sum E^2 = tr(dW H dW^T): the reported loss 1/2 sum E^2 is the
    damped squared output error per sequence. With R = U^-1 and D = W_in - W_out the same is E = D R, which needs no
    inverse of the whole Hessian: what the blocks so far changed, D, weighs on a block B by D R[:, B], and the block's
    best answer to it, were nothing in it pruned, is W_in + D R[:, B] R[B, B]^-1. From there on it is the paper's sweep.

    Args:
        weight: ``[rows, columns]``; not changed.
        factor: ``R`` of :func:`hessian_factor`, in the type to compute in.
        dead: inputs that never fired; they are pruned first.
        mask: bool ``[rows, columns]``, True where kept; None chooses it on the way, for ``target``.
        grid: what kept weights are rounded to; None leaves them as they are. The scale of a group is chosen when the
            sweep reaches it, for the values that the columns before it ask for.

    Raises:
        UserError: a ``block`` that cuts a group of the N:M pattern or of the grid.
    """
    pattern = target.pattern
    check_block(pattern, block, grid)
    columns = weight.shape[1]
    new = weight.to(factor.dtype, copy=True)
    new[:, dead] = 0
    chosen = torch.empty_like(new, dtype=torch.bool) if mask is None else mask
    scales = None
    if grid is not None:
        scales = torch.empty(len(new), grid.groups(columns), dtype=torch.float16, device=new.device)
    # Of blocks to come, how the changes so far weigh on them; of blocks that are done, their own change.
    change = torch.zeros_like(new)
    squared_error = torch.zeros((), dtype=torch.float64, device=new.device)

    def solve_block(start: int, end: int) -> None:
        span = slice(start, end)
        inverse = _upper_inverse(factor[span, span])
        before = new[:, span].clone()
        # Transposed, so that a column's weights of all rows lie side by side: every step runs over whole cache lines.
        part = _Block(before.addmm(change[:, span], inverse).T.contiguous(), inverse, dead[span], pattern, grid)
        if mask is not None:
            part.keep(mask[:, span].T.contiguous())
        elif pattern is None:
            # The plan's exact count, spread over the blocks so that every prefix is within one weight of its share.
            part.select(target.zeros * end // columns - target.zeros * start // columns)
        part.sweep()
        new[:, span] = part.new.T
        if mask is None:
            chosen[:, span] = part.mask.T
        if scales is not None and grid is not None:
            scales[:, start // grid.group : start // grid.group + len(part.scales)] = torch.stack(part.scales, dim=1)
        squared_error.add_(part.errors.square_().sum(dtype=torch.float64))
        torch.sub(before, new[:, span], out=change[:, span])

    def pass_on(start: int, middle: int, end: int) -> None:
        add_product(change[:, middle:end], change[:, start:middle], factor[start:middle, middle:end])

    _in_order(_bounds(0, columns, block), solve_block, pass_on)
    return Swept(new, chosen, squared_error.item() / 2, scales)


class _Block:
    """The sweep within one block.

    Args:
        new: ``[columns, rows]`` of the block, as the blocks before it want it.
        factor: the upper triangular ``U`` of these columns.

    Attributes:
        new, mask, errors: ``[columns, rows]``.
        scales: ``[rows]`` for each group of the grid.
    """

    def __init__(
        self, new: torch.Tensor, factor: torch.Tensor, dead: torch.Tensor, pattern: NM | None, grid: Grid | None
    ) -> None:
        self.new, self.factor, self.dead, self.grid = new, factor, dead, grid
        # Chosen group by group; None where the mask is known before the sweep.
        self.pattern = pattern
        self.mask = torch.empty_like(new, dtype=torch.bool)
        self.errors = torch.empty_like(new)
        self.scales: list[torch.Tensor] = []

    def keep(self, mask: torch.Tensor) -> None:
        """Sweep with this mask ``[columns, rows]``."""
        self.mask, self.pattern = mask, None

    def select(self, count: int) -> None:
        """Prune the ``count`` smallest scores; ties by row, then column."""
        scores = _scores(self.new, self.factor.diagonal(), self.dead).T.contiguous()
        self.mask = keep_all_but_smallest(scores.reshape(1, -1), count).reshape(scores.shape).T

    def sweep(self) -> None:
        """Go through all columns."""
        # A group of M or of the grid is chosen as a whole, so no leaf may cut one.
        leaf = _LEAF if self.pattern is None else max(_LEAF // self.pattern.m, 1) * self.pattern.m
        if self.grid is not None:
            leaf = self.grid.group

        def pass_on(first: int, middle: int, last: int) -> None:
            add_product(self.new[middle:last], self.factor[first:middle, middle:last].T, self.errors[first:middle], -1)

        _in_order(_bounds(0, len(self.new), leaf), self._leaf, pass_on)

    def _leaf(self, first: int, last: int) -> None:
        """Go through columns ``first`` to ``last`` one by one."""
        new, factor, errors = self.new, self.factor, self.errors
        scale = self._scale(first, last) if self.grid is not None else None
        step = last - first if self.pattern is None else self.pattern.m
        for start in range(first, last, step):
            group = slice(start, start + step)
            if self.pattern is not None:
                self.mask[group] = self._largest(group)
            kept = self.mask[group].to(new.dtype)
            if scale is not None and self.grid is not None:
                for j in range(start, start + step):
                    final = self.grid.codes(new[j], scale).mul_(scale).mul_(kept[j - start])
                    error = torch.sub(new[j], final, out=errors[j]).div_(factor[j, j])
                    new[j + 1 : last].addr_(factor[j, j + 1 : last], error, alpha=-1)
                    new[j] = final
                continue
            # Where a weight goes 1 / U_jj, where it stays 0: what turns a column into its error.
            share = (1 - kept).div_(factor.diagonal()[group, None])
            for j in range(start, start + step):
                error = torch.mul(new[j], share[j - start], out=errors[j])
                new[j + 1 : last].addr_(factor[j, j + 1 : last], error, alpha=-1)
            new[group].mul_(kept)

    def _scale(self, first: int, last: int) -> torch.Tensor:
        """The scale of these columns; of a pattern for what it would keep of them as they are now."""
        assert self.grid is not None
        mask = self.mask[first:last]
        if self.pattern is not None:
            m = self.pattern.m
            mask = torch.cat([self._largest(slice(start, start + m)) for start in range(first, last, m)])
        weight = self.factor.diagonal()[first:last].square().reciprocal()
        scale = self.grid.choose_scales(self.new[first:last], mask.to(self.new.dtype), weight)
        self.scales.append(scale)
        return scale

    def _largest(self, group: slice) -> torch.Tensor:
        assert self.pattern is not None
        return keep_largest(_scores(self.new[group], self.factor.diagonal()[group], self.dead[group]), self.pattern.n)


def _upper_inverse(factor: torch.Tensor) -> torch.Tensor:
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity, upper=True)


def check_block(pattern: NM | None, block: int, grid: Grid | None = None) -> None:
    """Refuse a block that would cut a group of M, or of columns that share a scale.

    Raises:
        UserError: an N:M pattern whose M, or a grid whose group, does not divide ``block``.
    """
    if grid is not None and block % grid.group:
        raise UserError(
            f"SparseGPT's block of {block} columns is not divisible by {grid.group}, which share a scale",
            f"Set the option block to a multiple of {grid.group}.",
        )
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


def _scores(new: torch.Tensor, diagonal: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """W^2 / U_jj^2 ``[columns, rows]``, the error of dropping each weight; dead inputs cost less than anything."""
    scores = (new / diagonal[:, None]).square()
    scores[dead] = -1
    return scores
