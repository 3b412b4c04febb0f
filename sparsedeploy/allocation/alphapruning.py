"""AlphaPruning: layers whose weight spectra have heavier tails keep more weights.

Lu et al., NeurIPS 2024, arXiv 2410.10912: the exponent of each spectrum by Hill's estimator, alpha = 1 + n / sum
ln(l_i / l_min), and rates that rise linearly with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from sparsedeploy.allocation.base import Allocation, check_scores, layer_units, module_units
from sparsedeploy.calibration.driver import LayerContext
from sparsedeploy.options import Options, option
from sparsedeploy.plan import ModuleShape
from sparsedeploy.registry import ALLOCATORS

# Relative to the largest. The released code keeps every eigenvalue; below 1e-12 there is only rounding. The intended
# tail needs none of those that a nearly rank-deficient matrix adds.
_SMALLEST_EIGENVALUE = {"reference": 1e-12, "intended": 1e-5}
_BINS = 100
_PAIRS_AT_ONCE = 1 << 22  # (candidate, tail entry) pairs in memory: 32 MB in float64


@dataclass(frozen=True)
class AlphaPruningOptions(Options):
    """How AlphaPruning fits the spectra, and how far it spreads the rates."""

    strength: float = option(0.3, "epsilon; the rates' factors span [1 - strength, 1 + strength].", at_least=0, below=1)
    metric: Literal["alpha_peak", "alpha_mid"] = option(
        "alpha_peak",
        "`alpha_peak` searches the tail's start near the peak of the log spectrum for the best power-law fit; "
        "`alpha_mid` takes the upper half of the eigenvalues.",
    )
    lower_bound: Literal["reference", "intended"] = option(
        "reference",
        "`reference` compares eigenvalues with a logarithm and keeps the smallest ones, as the released code does, so "
        "that the search window has almost no lower end; `intended` is the window around the peak.",
    )
    granularity: Literal["layer", "projection"] = option(
        "layer", "One rate per `layer` (mean alpha of its linears) or per `projection`."
    )


@ALLOCATORS.register("alphapruning", AlphaPruningOptions, needs="weights", strength="strength")
class AlphaPruning:
    """Rates in proportion to the power-law exponents of the weight spectra; needs no data (Lu et al. 2024)."""

    def __init__(self, options: AlphaPruningOptions) -> None:
        self.options = options

    def measure(self, layer: LayerContext) -> list[float]:
        """The exponent of every linear of the layer."""
        return [
            tail_exponent(
                eigenvalues(linear.weight, self.options.lower_bound), self.options.metric, self.options.lower_bound
            )
            for linear in layer.linears.values()
        ]

    def allocate(self, measured: list[list[float]], layers: list[list[ModuleShape]], sparsity: float) -> Allocation:
        if self.options.granularity == "layer":
            alphas = [math.fsum(layer) / len(layer) for layer in measured]
            units = layer_units(layers, factors(alphas, self.options.strength))
        else:
            alphas = [alpha for layer in measured for alpha in layer]
            units = module_units(layers, factors(alphas, self.options.strength))
        return Allocation(units, rule="multiplicative", details={"alpha": alphas})


def factors(alphas: list[float], strength: float) -> list[float]:
    """(alpha - min) / (max - min) * 2 eps + 1 - eps; all 1 when the exponents are equal.

    Raises:
        UserError: exponents that are not finite.
    """
    check_scores(alphas)
    low, high = min(alphas), max(alphas)
    if high == low:
        return [1.0] * len(alphas)
    return [(alpha - low) / (high - low) * 2 * strength + 1 - strength for alpha in alphas]


def eigenvalues(weight: torch.Tensor, lower_bound: str = "reference") -> torch.Tensor:
    """The min(rows, columns) eigenvalues of W^T W, ascending, float64.

    From the smaller Gram matrix, in float64, at a fraction of the cost of a singular value decomposition.

    Args:
        lower_bound: ``reference`` drops only rounding (below 1e-12 of the largest), ``intended`` all below 1e-5 of it.
    """
    w = weight.detach().double()
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    values = torch.linalg.eigvalsh(gram)
    return values[values > _SMALLEST_EIGENVALUE[lower_bound] * values[-1]]


def tail_exponent(values: torch.Tensor, metric: str = "alpha_peak", lower_bound: str = "reference") -> float:
    """The power-law exponent alpha of the tail of a spectrum.

    For a tail that starts at index i with n entries: alpha = 1 + n / (sum ln lambda_k - n ln lambda_i). ``alpha_peak``
    takes, among the starts in the window, the one with the smallest Kolmogorov-Smirnov distance.

    Args:
        values: eigenvalues, ascending, positive, float64 ``[N]``.

    Returns:
        NaN when there are fewer than two eigenvalues or no tail can be fitted.
    """
    count = len(values)
    if count < 2:
        return math.nan
    logs = values.log()
    tails = torch.arange(count, 0, -1, dtype=torch.float64, device=values.device)
    suffix = logs.flip(0).cumsum(0).flip(0)
    alphas = 1 + tails / (suffix - tails * logs)
    if metric == "alpha_mid":
        return float(alphas[count // 2])
    log10 = (logs / math.log(10)).cpu()
    histogram = torch.histc(log10, _BINS, float(log10[0]), float(log10[-1]))
    peak = float(log10[0]) + int(histogram.argmax()) * float(log10[-1] - log10[0]) / _BINS
    start = 10**peak
    lowest = math.log10(0.95 * start) if lower_bound == "reference" else 0.95 * start
    # The last entry alone is no tail: its logarithms cancel.
    allowed = (values >= lowest) & (values <= 1.5 * start) & (tails > 1) & torch.isfinite(alphas) & (alphas > 1)
    candidates = allowed.nonzero().flatten()
    if len(candidates) == 0:
        return math.nan
    distances = torch.cat([_distances(logs, alphas, part) for part in candidates.split(_PAIRS_AT_ONCE // count + 1)])
    return float(alphas[candidates[distances.argmin()]])


def _distances(logs: torch.Tensor, alphas: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """KS(i) = max over k >= i of |1 - (lambda_k / lambda_i)^(1 - alpha_i) - (k - i) / n|, for each start i."""
    count = len(logs)
    index = torch.arange(count, device=logs.device)
    offset = index[None, :] - starts[:, None]
    fitted = 1 - torch.exp((1 - alphas[starts])[:, None] * (logs[None, :] - logs[starts][:, None]))
    gap = (fitted - offset / (count - starts)[:, None]).abs()
    return gap.masked_fill(offset < 0, 0).amax(dim=1)
