"""Ranks by reconstruction error: layers that pruning hurts more get larger adapters.

Huang et al., ICLR 2025, arXiv 2502.14816.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparsedeploy.errors import UserError


def allocate_ranks(losses: Sequence[float], mean_rank: float, *, r_max: int = 16, one_pass: bool = False) -> list[int]:
    """One rank per layer, r_l = clip(round(loss_l / mean loss * mean_rank), 1, r_max), then the budget is met.

    The budget is round(mean_rank * layers). What the rounding and the bounds leave is taken, one rank per layer and
    pass, from the layers of least loss, or given to those of most, until the budget is met or every layer is at a
    bound. Ranks never fall with the loss.

    Args:
        losses: the layers' reconstruction losses, not negative; equal losses (all zero too) give equal ranks.
        one_pass: the released code's budget fix, which stops after one pass and may miss the budget.

    Raises:
        UserError: losses that are negative or not finite, or a mean rank outside [1, r_max].
    """
    if bad := [at for at, loss in enumerate(losses) if not math.isfinite(loss) or loss < 0]:
        raise UserError(
            f"the reconstruction loss of layer {bad[0]} is {losses[bad[0]]}", "Check the checkpoint, or use float32."
        )
    if not 1 <= mean_rank <= r_max:
        raise UserError(f"mean rank {mean_rank:g} is outside [1, {r_max}], the adapters' size", "Raise r_max.")
    layers = len(losses)
    budget = round(mean_rank * layers)
    mean = math.fsum(losses) / layers
    ranks = [min(max(round(loss / mean * mean_rank), 1), r_max) if mean > 0 else round(mean_rank) for loss in losses]
    rising = sorted(range(layers), key=lambda layer: (losses[layer], layer))
    while sum(ranks) != budget:
        before = sum(ranks)
        step = 1 if before < budget else -1
        for layer in reversed(rising) if step > 0 else rising:
            if sum(ranks) == budget:
                break
            if 1 <= ranks[layer] + step <= r_max:
                ranks[layer] += step
        if one_pass or sum(ranks) == before:
            break
    return ranks
