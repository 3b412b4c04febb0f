"""Scores of single weights that pruners and allocators share."""

from __future__ import annotations

import torch


def wanda_scores(weight: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    """S_ij = |W_ij| * sqrt(a_j), fp32 ``[rows, columns]`` (Sun et al. 2024, eq. 1; a constant factor cancels)."""
    return weight.float().abs() * mean_square.sqrt()
