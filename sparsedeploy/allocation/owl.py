"""OWL: layers with more outlier scores keep more weights (Yin et al., ICML 2024, arXiv 2310.05175).

D_l = the share of the layer's scores |W_ij| ||X_j|| above M times their mean; s_l = s - (d_l - mean d), d_l D_l scaled
to a given span.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsedeploy.allocation.base import Allocation, centred_range, layer_scores, layer_units
from sparsedeploy.calibration.driver import LayerContext
from sparsedeploy.options import Options, option
from sparsedeploy.plan import ModuleShape
from sparsedeploy.registry import ALLOCATORS


@dataclass(frozen=True)
class OWLOptions(Options):
    """What OWL counts as an outlier, and how far it spreads the rates."""

    strength: float = option(
        0.08,
        "lambda; the rates span `2 * strength`, not centred on the target when outliers are skewed.",
        at_least=0,
    )
    m: float = option(5.0, "A score is an outlier when it exceeds `m` times its layer's mean score.", above=0)


@ALLOCATORS.register("owl", OWLOptions, needs="sum_squares", strength="strength")
class OWL:
    """Outlier-weighed layerwise sparsity: s_l = s - (d_l - mean d), d from the share of outliers (Yin et al. 2024)."""

    def __init__(self, options: OWLOptions) -> None:
        self.options = options

    def measure(self, layer: LayerContext) -> float:
        """Percent of the layer's Wanda scores above ``m`` times the mean of all of them; two passes, nothing kept."""
        total, count, above = 0.0, 0, 0
        for scores in layer_scores(layer):
            total += scores.sum(dtype=torch.float64).item()
            count += scores.numel()
        threshold = self.options.m * total / count
        for scores in layer_scores(layer):
            above += int((scores > threshold).sum())
        return 100 * above / count

    def allocate(self, measured: list[float], layers: list[list[ModuleShape]], sparsity: float) -> Allocation:
        density = centred_range(measured, self.options.strength)
        return Allocation(layer_units(layers, [-d for d in density]), details={"outlier_percent": measured})
