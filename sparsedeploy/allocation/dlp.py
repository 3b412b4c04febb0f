"""DLP: layers whose typical weight score is low keep more weights (Chen et al., ICML 2025, arXiv 2505.23807).

I_l = 1 - R_l / sum R, R_l the median of the layer's scores |W_ij| ||X_j||.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from sparsedeploy.allocation.base import (
    Allocation,
    centred_range,
    layer_scores,
    layer_units,
    tabulated_strength,
)
from sparsedeploy.allocation.select import lower_median
from sparsedeploy.calibration.driver import LayerContext
from sparsedeploy.options import Options, option
from sparsedeploy.plan import ModuleShape
from sparsedeploy.registry import ALLOCATORS


@dataclass(frozen=True)
class DLPOptions(Options):
    """What DLP takes for a layer's typical score, and how far it spreads the rates."""

    reduce: Literal["median", "mean"] = option(
        "median", "The typical score of a layer: the `median` of the paper, or the `mean` of the released code."
    )
    strength: float | None = option(
        None, "alpha; the rates span `2 * strength`. None takes the published table (0.15 at 70 %).", at_least=0
    )


@ALLOCATORS.register("dlp", DLPOptions, needs="sum_squares", strength="strength")
class DLP:
    """Dynamic layerwise pruning: I_l = 1 - R_l / sum R, R_l the layer's median Wanda score (Chen et al. 2025)."""

    def __init__(self, options: DLPOptions) -> None:
        self.options = options

    def measure(self, layer: LayerContext) -> float:
        """R_l over all of the layer's linears together; their scores are never concatenated."""
        if self.options.reduce == "median":
            return lower_median(lambda: layer_scores(layer))
        total, count = 0.0, 0
        for scores in layer_scores(layer):
            total += scores.sum(dtype=torch.float64).item()
            count += scores.numel()
        return total / count

    def allocate(self, measured: list[float], layers: list[list[ModuleShape]], sparsity: float) -> Allocation:
        strength = tabulated_strength(sparsity) if self.options.strength is None else self.options.strength
        # I = 1 - R / sum R falls linearly with R, and the range is normalised next: -R gives the same densities.
        density = centred_range([-score for score in measured], strength)
        return Allocation(
            layer_units(layers, [-d for d in density]), details={f"{self.options.reduce}_score": measured}
        )
