"""Scores of single weights that pruners and allocators share."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_BLOCK = 1 << 18  # 1 MB of scores: stays in a core's cache from the product to whatever reads it


def wanda_score_blocks(weight: torch.Tensor, mean_square: torch.Tensor) -> Iterator[torch.Tensor]:
    """S_ij = |W_ij| * sqrt(a_j), fp32, a block of rows ``[some, columns]`` at a time; on CUDA all at once.

    Sun et al. 2024, eq. 1; a constant factor cancels.
    """
    norms = mean_square.sqrt()
    rows = len(weight) if weight.is_cuda else max(1, _BLOCK // weight.shape[1])
    for block in weight.detach().split(rows):
        yield block.float().abs().mul_(norms)
