"""How sparsity and mean rank grow over LoSA's steps.

The cubic schedule is that of Zhu and Gupta, ICLR 2018 workshop, arXiv 1710.01878, eq. 1.
"""

from __future__ import annotations

from typing import Literal

from sparsedeploy.errors import UserError
from sparsedeploy.plan import check_sparsity

Shape = Literal["cubic", "linear"]


def sparsity_schedule(final: float, steps: int, shape: Shape = "cubic") -> list[float]:
    """The global sparsity after each step; the last is ``final`` exactly.

    cubic: final - final (1 - t/T)^3 (Zhu & Gupta 2017, as LoSA uses it); linear: final t/T.

    Raises:
        UserError: no step, or a final sparsity outside [0, 1).
    """
    check_sparsity(final)
    if steps < 1:
        raise UserError(f"a schedule of {steps} steps does nothing", "Use at least 1 step.")
    if shape == "linear":
        return [final * step / steps for step in range(1, steps)] + [final]
    return [final - final * (1 - step / steps) ** 3 for step in range(1, steps)] + [final]


def mean_ranks(steps: int, first: float = 6.0, increment: float = 1.0) -> list[float]:
    """The mean rank Omega_t of each step: 6, 7, 8, 9, 10 for the published five, 8 on average.

    Raises:
        UserError: a mean rank below 1.
    """
    ranks = [first + increment * step for step in range(steps)]
    if min(ranks, default=1.0) < 1:
        raise UserError(f"a mean rank of {min(ranks):g} leaves layers without an adapter", "Start at 1 or more.")
    return ranks
