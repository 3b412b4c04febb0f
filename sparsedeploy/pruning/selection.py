"""Exact-k masks. A mask is boolean, True where a weight is **kept**; ties go to the lower index first."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch

from sparsedeploy.plan import ModuleTarget


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
    threshold = _kth_smallest(scores, k)
    kept = scores > threshold
    # No row keeps more than columns - k above its threshold: right in total is right in each. Sums by row cost more.
    if int(torch.count_nonzero(kept)) == len(scores) * (columns - k):
        return kept
    missing = columns - k - kept.sum(dim=-1)
    short = missing.nonzero().flatten()
    equal = scores[short] == threshold[short]
    dropped = equal.sum(dim=-1, keepdim=True) - missing[short, None]
    kept[short] |= equal & (equal.cumsum(dim=-1) > dropped)
    return kept


def _kth_smallest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The ``k``-th smallest of each row, counted from 1: ``[rows, 1]``.

    On the CPU by numpy's vectorised partition, in as many threads as torch uses; it is 15 times as fast as torch's.
    """
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        return scores.kthvalue(k, dim=-1, keepdim=True).values
    parts = [part.numpy() for part in scores.chunk(torch.get_num_threads())]

    def select(part: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.partition(part, k - 1, axis=-1)[:, k - 1 : k])

    if len(parts) == 1:
        return torch.from_numpy(select(parts[0]))
    return torch.from_numpy(np.concatenate(list(_pool().map(select, parts))))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="select")


def keep_largest(scores: torch.Tensor, n: int) -> torch.Tensor:
    """Keep the ``n`` largest along the first axis of ``[m, ...]``; among equal scores the first are dropped.

    By rank: an entry goes if fewer than ``m - n`` others are smaller or equal and before it. For the small m of N:M
    that is a few comparisons, where a sort of many short groups is slow.
    """
    m = scores.shape[0]
    rank = torch.zeros(scores.shape, dtype=torch.uint8, device=scores.device)
    for i in range(m):
        for j in range(i + 1, m):
            later_is_smaller = scores[j] < scores[i]
            rank[i] += later_is_smaller
            rank[j] += ~later_is_smaller
    return rank >= m - n


def keep_n_of_m(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Keep the ``n`` largest of every ``m`` consecutive columns of ``[rows, columns]``; ``columns % m`` must be 0."""
    rows, columns = scores.shape
    groups = scores.reshape(rows, columns // m, m).permute(2, 0, 1).contiguous()
    return keep_largest(groups, n).permute(1, 2, 0).reshape(rows, columns)


def keep_by_target(scores: torch.Tensor, target: ModuleTarget) -> torch.Tensor:
    """The mask of all or some rows of a module, by the scores of their weights: its pattern, or its zeros per row."""
    if target.pattern is not None:
        return keep_n_of_m(scores, target.pattern.n, target.pattern.m)
    return keep_all_but_smallest(scores, target.zeros_per_row)
