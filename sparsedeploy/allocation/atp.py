"""ATP: sparsity rises linearly with depth, because errors of early layers travel furthest.

Huang et al., *Determining Layer-wise Sparsity*, ICML 2025, arXiv 2502.14770: s_i = S - beta (L - 1) / 2 +
beta (i - 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sparsedeploy import progress
from sparsedeploy.allocation.base import Allocation, Search, layer_units
from sparsedeploy.calibration.driver import LayerContext
from sparsedeploy.errors import UserError
from sparsedeploy.options import Options, option
from sparsedeploy.plan import ModuleShape, SparsityPlan
from sparsedeploy.registry import ALLOCATORS


@dataclass(frozen=True)
class ATPOptions(Options):
    """The step of the progression, or how it is searched."""

    beta: float | None = option(
        None,
        "The step in sparsity from layer to layer; None takes half of the largest legal one, which is 0.0097 for 32 "
        "layers at 70 %.",
    )
    search: bool = option(
        False, "Choose beta by trial: prune with each candidate and keep the one with the lowest perplexity."
    )
    step: float = option(0.002, "Distance between candidates; 0.002 in the paper.", above=0, only_with="search")
    trials: int = option(
        16,
        "Maximum number of trials; where `step` gives more (shallow models), they are spread over the legal range.",
        at_least=1,
        only_with="search",
    )
    patience: int = option(
        3,
        "Stop after this many trials in a row without an improvement; 0 runs them all, as the paper does.",
        at_least=0,
        only_with="search",
    )
    selection: Literal["validation", "test"] = option(
        "validation",
        "`validation` selects on validation text; `test` on the test text, as the released script does, so that the "
        "reported perplexity is then too good.",
        only_with="search",
    )
    text: str | None = option(
        None, "Text to select on; None takes the calibration source's own split.", only_with="search", reads=True
    )
    windows: int = option(32, "Number of its windows to evaluate.", at_least=1, only_with="search")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search and self.beta is not None:
            raise ValueError("give either beta or search=true, not both")


@ALLOCATORS.register("atp", ATPOptions, needs="none", strength="beta", searches=lambda options: options.search)
class ATP:
    """Arithmetic progression over depth, s_i = S - beta (L - 1) / 2 + beta (i - 1); no data (Huang et al. 2025)."""

    def __init__(self, options: ATPOptions) -> None:
        self.options = options

    def measure(self, layer: LayerContext) -> None:
        return None

    def allocate(self, measured: list[None], layers: list[list[ModuleShape]], sparsity: float) -> Allocation:
        """Raises UserError for a beta that leads outside [0, 1]."""
        count = len(layers)
        bound = largest_beta(sparsity, count)
        beta = bound / 2 if self.options.beta is None else self.options.beta
        if not 0 <= beta <= bound + 1e-12:
            raise UserError(
                f"beta {beta:g} pushes the sparsity of some of the {count} layers around {sparsity:g} outside [0, 1]",
                f"Use a beta from 0 to {bound:.6g}.",
            )
        deviations = [beta * (index - (count - 1) / 2) for index in range(count)]
        return Allocation(layer_units(layers, deviations), details={"beta": beta, "largest_beta": bound})

    def search(self, search: Search) -> tuple[SparsityPlan, dict[str, Any]]:
        """Raises UserError when every trial diverged."""
        asked = self.options
        found = search_beta(
            search.trial_on(asked.text, asked.selection, asked.windows),
            lambda beta: search.plan_with(ATPOptions(beta=beta)),
            trial_betas(search.sparsity, len(search.layers), asked.step, asked.trials),
            patience=asked.patience,
        )
        return found.plan, {"selection": asked.selection, "trials": found.to_dict()}


def largest_beta(sparsity: float, layers: int) -> float:
    """min(2 S / (L - 1), 2 (1 - S) / (L - 1)): beyond it a layer's rate leaves [0, 1]; 0 for a single layer."""
    return 2 * min(sparsity, 1 - sparsity) / (layers - 1) if layers > 1 else 0.0


def trial_betas(sparsity: float, layers: int, step: float = 0.002, at_most: int | None = None) -> list[float]:
    """step, 2 step, ... while legal.

    Args:
        at_most: when there would be more, so many values spread evenly up to the bound.
    """
    bound = largest_beta(sparsity, layers)
    count = math.floor(bound / step + 1e-9)
    if at_most is not None and count > at_most:
        step, count = bound / at_most, at_most
    return [step * (index + 1) for index in range(count)]


@dataclass(frozen=True)
class BetaSearch:
    """What :func:`search_beta` found.

    Attributes:
        plan: the plan of the best trial.
        trials: beta -> perplexity (infinite for a diverged trial), in the order tried; the first is uniform.
    """

    beta: float
    plan: SparsityPlan
    trials: dict[float, float]

    def to_dict(self) -> list[dict[str, Any]]:
        """The table, with None for diverged trials."""
        return [
            {"beta": beta, "perplexity": score if math.isfinite(score) else None} for beta, score in self.trials.items()
        ]


def search_beta(
    trial: Callable[[SparsityPlan], float],
    plan_for: Callable[[float], SparsityPlan],
    betas: Sequence[float],
    *,
    patience: int = 3,
) -> BetaSearch:
    """Try beta = 0 and then each of ``betas`` in order; the lowest perplexity wins.

    Each trial adds a line to a table on standard error. Uniform (beta = 0) comes first, so that the search never does
    worse than it on the text it selects on.

    Args:
        trial: prunes a copy of the model by the plan and returns its perplexity; not finite counts as diverged.
        plan_for: the plan of a beta.
        patience: stop after so many trials in a row without a better one; 0 never stops early.

    Raises:
        UserError: every trial diverged.
    """
    trials: dict[float, float] = {}
    best: tuple[float, float, SparsityPlan] | None = None
    since_best = 0
    progress.note("    beta  perplexity")
    with progress.bar("search beta", len(betas) + 1, "trials") as advance:
        for beta in (0.0, *betas):
            with progress.hidden():
                plan = plan_for(beta)
                score = trial(plan)
            trials[beta] = score = score if math.isfinite(score) else math.inf
            better = score < (best[0] if best else math.inf)
            progress.note(f"{beta:8.5f}  {score:10.3f}{'  best so far' if better else ''}")
            since_best = 0 if better else since_best + 1
            if better:
                best = (score, beta, plan)
            advance(1, f"best {best[1]:g}" if best else "")
            if patience and since_best >= patience:
                progress.note(f"stopped: {patience} trials in a row were no better")
                break
    if best is None:
        raise UserError("every trial of the beta search diverged", "Lower the sparsity or use another method.")
    return BetaSearch(best[1], best[2], trials)
