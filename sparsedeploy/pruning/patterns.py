"""Exact-k masks. A mask is boolean, True where a weight is **kept**; ties go to the lower index first."""

from __future__ import annotations

import torch


def keep_all_but_smallest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Drop the ``k`` smallest scores of each row of ``[rows, columns]``; among equal scores the first are dropped.

    Equal to a stable ascending sort, by selection: everything below the k-th value goes, then as many of its equals,
    from the left, as are still wanted.
    """
    columns = scores.shape[-1]
    if k <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if k >= columns:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(k, dim=-1, keepdim=True).values
    below = scores < threshold
    equal = scores == threshold
    wanted = k - below.sum(dim=-1, keepdim=True)
    return ~(below | (equal & (equal.cumsum(dim=-1) <= wanted)))


def keep_n_of_m(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Keep the ``n`` largest of every ``m`` consecutive columns of ``[rows, columns]``; ``columns % m`` must be 0."""
    rows, columns = scores.shape
    groups = scores.reshape(rows * (columns // m), m)
    order = groups.argsort(dim=-1, stable=True)
    mask = torch.ones_like(groups, dtype=torch.bool)
    mask.scatter_(1, order[:, : m - n], False)
    return mask.reshape(rows, columns)


def follows_n_of_m(mask: torch.Tensor, n: int, m: int) -> bool:
    """Whether every group of ``m`` consecutive columns keeps at most ``n`` weights."""
    rows, columns = mask.shape
    if columns % m:
        return False
    return bool((mask.reshape(rows, columns // m, m).sum(dim=-1) <= n).all())
