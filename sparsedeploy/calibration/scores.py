"""Scores of single weights that pruners and allocators share."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_BLOCK = 1 << 18  # 1 MB of scores: stays in a core's cache from the product to whatever reads it


def wanda_scores(weight: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    """S_ij = |W_ij| * sqrt(a_j), fp32 ``[rows, columns]`` (Sun et al. 2024, eq. 1; a constant factor cancels)."""
    return weight.float().abs() * mean_square.sqrt()


def wanda_score_blocks(weight: torch.Tensor, mean_square: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows of :func:`wanda_scores` in blocks, for reductions that need not hold a whole matrix of scores."""
    norms = mean_square.sqrt()
    rows = len(weight) if weight.is_cuda else max(1, _BLOCK // weight.shape[1])
    for block in weight.detach().split(rows):
        yield block.float().abs().mul_(norms)
