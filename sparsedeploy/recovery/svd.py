"""Best rank-r factors of a matrix: the full SVD, or a seeded randomised one where that is much cheaper."""

from __future__ import annotations

from typing import Literal

import torch

SVDMethod = Literal["auto", "full", "randomized"]
_OVERSAMPLING = 16
_POWER_ITERATIONS = 6
_CHEAPER_FROM = 4  # times the wanted rank: below that the full SVD costs about the same


def top_singular(
    matrix: torch.Tensor, rank: int, *, method: SVDMethod = "auto", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The ``rank`` largest singular triplets, U ``[m, r]``, s ``[r]``, V^T ``[r, n]``, in float32 (or float64).

    ``rank`` is capped at the smaller dimension. The randomised method is Halko, Martinsson & Tropp's (2011) subspace
    iteration with orthonormalisation at every half step.
    """
    work = matrix if matrix.dtype == torch.float64 else matrix.float()
    small = min(work.shape)
    rank = min(rank, small)
    if method == "auto":
        method = "randomized" if _CHEAPER_FROM * (rank + _OVERSAMPLING) < small else "full"
    if method == "full" or rank + _OVERSAMPLING >= small:
        u, s, vh = torch.linalg.svd(work, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(work.shape[1], rank + _OVERSAMPLING, generator=generator).to(work)
    basis = torch.linalg.qr(work @ probe).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(work.T @ basis).Q
        basis = torch.linalg.qr(work @ basis).Q
    u, s, vh = torch.linalg.svd(basis.T @ work, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vh[:rank]


def low_rank_factors(
    matrix: torch.Tensor, rank: int, *, method: SVDMethod = "auto", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[r, n]`` = V^T and B ``[m, r]`` = U diag(s), whose product B A is the matrix's best rank-r approximation."""
    u, s, vh = top_singular(matrix, rank, method=method, seed=seed)
    return vh.contiguous(), (u * s).contiguous()
