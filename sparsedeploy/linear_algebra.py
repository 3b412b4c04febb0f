"""What is done to large matrices, in the ways that are fastest on each device: products, a factorisation, a test."""

from __future__ import annotations

import torch
from torch.nn import functional

# Below this many multiplications the copies into oneDNN's layout cost more than its product gains.
_WORTH_COPIES = 1 << 25
# Matrices up to this size are factorised, solved with or squared in one piece.
_LEAF = {"cpu": 128, "cuda": 2048}


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity: the extremes carry any, and are far cheaper than a test of each."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, sign: int = 1) -> None:
    """``total [m, n] += sign * left [m, k] @ right [k, n]``, in place.

    In float32 on a CPU through oneDNN: torch's own choice, MKL, leaves AVX-512 aside on processors that are not
    Intel's and takes twice as long.
    """
    if _favours_onednn(left) and left.shape[0] * left.shape[1] * right.shape[1] >= _WORTH_COPIES:
        product = functional.linear(left.contiguous().to_mkldnn(), right.T.contiguous().to_mkldnn()).to_dense()
        total.add_(product, alpha=sign)
    else:
        total.addmm_(left, right, alpha=sign)


def add_gram(total: torch.Tensor, x: torch.Tensor, sign: int = 1) -> None:
    """The upper triangle of ``total [n, n] += sign * x @ x.T`` for ``x [n, k]``; what is below it is anybody's.

    By halves, so that half of the work is left out.
    """
    size = len(x)
    if size <= _LEAF[x.device.type]:
        total.addmm_(x, x.T, alpha=sign)
        return
    half = size // 2
    add_gram(total[:half, :half], x[:half], sign)
    add_product(total[:half, half:], x[:half], x[half:].T, sign)
    add_gram(total[half:, half:], x[half:], sign)


def upper_cholesky_(matrix: torch.Tensor) -> bool:
    """Turn a symmetric ``[n, n]``, of which the upper triangle is given and the rest zero, into the upper triangular
    ``R`` with ``matrix = R @ R.T``.

    Returns:
        Whether it is positive definite; if not, ``matrix`` is spoilt.
    """
    return _factorise(matrix, _LEAF["cpu"] if _favours_onednn(matrix) else len(matrix))


def _factorise(matrix: torch.Tensor, leaf: int) -> bool:
    """:func:`upper_cholesky_` by halves, down to ``leaf``.

    With the halves A, B and C of ``[[A, B], [., C]]``: C = R R^T gives B <- B R^-T, and A - B B^T is what is left.
    """
    size = len(matrix)
    if size <= leaf:
        # With J the reversal: J C J = L L^T gives C = (J L J) (J L J)^T.
        lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        matrix.copy_(lower.flip(0, 1))
        return not failed
    half = size // 2
    if not _factorise(matrix[half:, half:], leaf):
        return False
    _divide(matrix[:half, half:], matrix[half:, half:], leaf)
    add_gram(matrix[:half, :half], matrix[:half, half:], -1)
    return _factorise(matrix[:half, :half], leaf)


def _divide(dividend: torch.Tensor, upper: torch.Tensor, leaf: int) -> None:
    """``dividend [m, n] <- dividend @ upper^-T`` for an upper triangular ``[n, n]``, in place, by halves."""
    size = len(upper)
    if size <= leaf:
        dividend.copy_(torch.linalg.solve_triangular(upper.T, dividend, upper=False, left=False))
        return
    half = size // 2
    _divide(dividend[:, half:], upper[half:, half:], leaf)
    add_product(dividend[:, :half], dividend[:, half:], upper[:half, half:].T, -1)
    _divide(dividend[:, :half], upper[:half, :half], leaf)


def _favours_onednn(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and torch.backends.mkldnn.is_available()
