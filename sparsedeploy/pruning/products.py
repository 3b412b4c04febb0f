"""Large matrix products and the inverse of a triangular matrix, in the ways that are fastest on each device."""

from __future__ import annotations

import torch
from torch.nn import functional

# Below this many multiplications the copies of the other layout cost more than the product gains.
_WORTH_COPIES = 1 << 26
_LEAF = 64


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left [m, k] @ right [k, n]``.

    In float32 on a CPU through oneDNN: torch's own choice, MKL, leaves AVX-512 aside on processors that are not
    Intel's and takes twice as long.
    """
    if not _favours_onednn(left, right):
        return left @ right
    return functional.linear(left.contiguous().to_mkldnn(), right.T.contiguous().to_mkldnn()).to_dense()


def subtract_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total -= left @ right``, in place."""
    if _favours_onednn(left, right):
        total.sub_(product(left, right))
    else:
        total.addmm_(left, right, alpha=-1)


def _favours_onednn(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.device.type == "cpu"
        and left.dtype == torch.float32
        and left.shape[0] * left.shape[1] * right.shape[1] >= _WORTH_COPIES
        and torch.backends.mkldnn.is_available()
    )


def triangular_inverse(lower: torch.Tensor) -> torch.Tensor:
    """The inverse of a lower triangular ``[n, n]``: by halves, so that nearly all of it is matrix products.

    With the halves A, B and C below: ``[[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]``.
    """
    size = len(lower)
    if size <= _LEAF:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, identity, upper=False)
    half = size // 2
    first, second = triangular_inverse(lower[:half, :half]), triangular_inverse(lower[half:, half:])
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = first
    inverse[half:, half:] = second
    inverse[half:, :half] = product(second, product(lower[half:, :half], first)).neg_()
    return inverse
