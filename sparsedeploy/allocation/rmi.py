"""RMI: layers whose representation is like the other layers' are pruned more; LoSA's layer rates.

Huang et al., *Dynamic Low-Rank Sparse Adaptation*, ICLR 2025, arXiv 2502.14816: I_l = exp(-h_l / sum h), h_l the sum
of the linear CKA between layer l and each other one; the rates minimise sum I_l s_l within bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sparsedeploy.allocation.base import Allocation, check_scores, layer_units
from sparsedeploy.allocation.budget import HIGHEST_RATE, LOWEST_RATE
from sparsedeploy.calibration.driver import LayerContext
from sparsedeploy.errors import UserError
from sparsedeploy.options import Options, option
from sparsedeploy.plan import ModuleShape
from sparsedeploy.registry import ALLOCATORS

_CHUNK = 1 << 24  # elements of centred features in memory at once


@dataclass(frozen=True)
class RMIOptions(Options):
    """What RMI compares, and how far the rates may lie from the target."""

    delta: float | None = option(
        None,
        "Rates stay within `delta` of the target; None takes LoSA's 0.01, 0.02 or 0.03 by target.",
        at_least=0,
    )
    feature: Literal["input", "output"] = option(
        "input",
        "Compare the hidden states that enter the layers (the released code) or that leave them (the paper).",
    )
    samples: int | None = option(64, "Number of calibration sequences to compare; None takes all.", at_least=2)
    scale: float = option(1.0, "b in I = exp(-b g); with `solver=exact` it changes only mixed N:M patterns.", above=0)
    solver: Literal["exact", "reference"] = option(
        "exact",
        "`exact` solves the linear program: layers lie at the bounds. `reference` is the released code's SLSQP from "
        "all ones, which stays near uniform where importances are close (needs scipy).",
    )


@ALLOCATORS.register("rmi", RMIOptions, needs="inputs", strength="delta", sequences="samples")
class RMI:
    """Layer rates from the redundancy (linear CKA) between layers' representations (Huang et al. 2025, LoSA)."""

    def __init__(self, options: RMIOptions) -> None:
        self.options = options

    def measure(self, layer: LayerContext) -> torch.Tensor:
        """The centred Gram matrix of the layer's feature, float64 ``[samples, samples]``."""
        hidden = layer.inputs if self.options.feature == "input" else layer.outputs
        assert hidden is not None
        return centred_gram(hidden[: self.options.samples])

    def allocate(self, measured: list[torch.Tensor], layers: list[list[ModuleShape]], sparsity: float) -> Allocation:
        delta = default_delta(sparsity) if self.options.delta is None else self.options.delta
        importance = rmi_importance(linear_cka(torch.stack(measured)), self.options.scale)
        sizes = [sum(module.size for module in layer) for layer in layers]
        low, high = max(sparsity - delta, LOWEST_RATE), max(min(sparsity + delta, HIGHEST_RATE), sparsity)
        exact = self.options.solver == "exact"
        solve = bounded_allocation if exact else sequential_least_squares
        rates = solve(importance, sizes, sparsity, low, high)
        return Allocation(
            layer_units(layers, [rate - sparsity for rate in rates]),
            details={"importance": importance, "delta": delta},
            window=delta,
            ranking=tuple(importance) if delta > 0 and exact else None,
        )


def sequential_least_squares(
    importance: Sequence[float], sizes: Sequence[int], target: float, low: float, high: float
) -> list[float]:
    """The released code's solution of :func:`bounded_allocation`'s problem: SLSQP from x = 1, default tolerance.

    It stops before layers of nearly equal importance have moved to their bounds.

    Raises:
        UserError: scipy is not installed.
    """
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise UserError(
            "solver=reference needs scipy", "Install it: pip install scipy; or use solver=exact."
        ) from error
    check_scores(importance)
    weights = [size / sum(sizes) for size in sizes]
    found = minimize(
        lambda x: sum(score * rate for score, rate in zip(importance, x, strict=True)),
        [1.0] * len(sizes),
        method="SLSQP",
        bounds=[(low, high)] * len(sizes),
        constraints={"type": "eq", "fun": lambda x: sum(w * rate for w, rate in zip(weights, x, strict=True)) - target},
    )
    return [min(max(float(rate), low), high) for rate in found.x]


def default_delta(sparsity: float) -> float:
    """LoSA's window: 0.01 up to 50 %, 0.02 up to 60 %, 0.03 above."""
    if sparsity <= 0.5:
        return 0.01
    return 0.02 if sparsity <= 0.6 else 0.03


def centred_gram(hidden: torch.Tensor) -> torch.Tensor:
    """C F F^T C of hidden states ``[samples, tokens, width]`` flattened to F, as float64 ``[samples, samples]``.

    In chunks of tokens: each is centred over the samples before the product (so that nothing cancels afterwards),
    multiplied in float32 and added in float64. Nothing but the Gram matrix is kept.
    """
    samples, tokens, width = hidden.shape
    gram = torch.zeros(samples, samples, dtype=torch.float64, device=hidden.device)
    step = max(1, _CHUNK // (samples * width))
    for start in range(0, tokens, step):
        features = hidden[:, start : start + step].reshape(samples, -1)
        features = features.to(torch.float64 if features.dtype == torch.float64 else torch.float32)
        features = features - features.mean(dim=0)
        gram += (features @ features.T).double()
    return (gram + gram.T) / 2


def linear_cka(grams: torch.Tensor) -> torch.Tensor:
    """Linear centred kernel alignment between layers, ``<K_i, K_j> / (|K_i| |K_j|)`` in Frobenius products.

    Args:
        grams: ``[layers, samples, samples]``, centred or not.

    Returns:
        float64 ``[layers, layers]``, symmetric, diagonal 1.

    Raises:
        UserError: fewer than two samples, samples that are all alike, or values that are not finite.
    """
    count = grams.shape[-1]
    fix = "Use at least 2 different calibration sequences: --samples."
    if count < 2:
        raise UserError("RMI compares calibration sequences and there is only one", fix)
    kernels = grams.double()
    kernels = kernels - kernels.mean(dim=-1, keepdim=True)
    kernels = (kernels - kernels.mean(dim=-2, keepdim=True)).flatten(1)
    norms = kernels.norm(dim=1)
    if not torch.isfinite(norms).all():
        raise UserError("the representations of a layer are not finite", "Check the checkpoint, or use float32.")
    if (norms <= 0).any():
        raise UserError("the calibration sequences are all alike in some layer, so RMI cannot compare layers", fix)
    unit = kernels / norms[:, None]
    return unit @ unit.T


def rmi_importance(cka: torch.Tensor, scale: float = 1.0) -> list[float]:
    """I_i = exp(-scale * h_i / sum h), h_i the similarity of layer i to all others; higher keeps more.

    Args:
        cka: ``[layers, layers]`` of :func:`linear_cka`.
    """
    similarity = (cka - torch.diag(cka.diagonal())).sum(dim=1).double()
    total = similarity.sum()
    if total == 0:  # one layer, or layers without anything in common
        return [1.0] * len(similarity)
    return [math.exp(-scale * share) for share in (similarity / total).tolist()]


def bounded_allocation(
    importance: Sequence[float],
    sizes: Sequence[int],
    target: float,
    low: Sequence[float] | float,
    high: Sequence[float] | float,
) -> list[float]:
    """The exact solution of: minimise sum P_i I_i x_i subject to sum P_i x_i = target * sum P_i, low <= x <= high.

    All start at ``low``; the least important rise to ``high`` first until the budget is used. Units of
    equal importance rise together, so equal scores give a uniform allocation.

    Args:
        low, high: one bound for all units or one per unit.

    Returns:
        The rates; at most one group of equals lies strictly between its bounds.

    Raises:
        UserError: bounds that cannot meet the target, or importances that are not finite.
    """
    check_scores(importance)
    count = len(importance)
    lows = [float(low)] * count if isinstance(low, (int, float)) else [float(x) for x in low]
    highs = [float(high)] * count if isinstance(high, (int, float)) else [float(x) for x in high]
    room = [size * (top - bottom) for size, bottom, top in zip(sizes, lows, highs, strict=True)]
    total = sum(sizes)
    left = math.fsum([target * total, *(-size * bottom for size, bottom in zip(sizes, lows, strict=True))])
    slack = 1e-9 * total
    if min(room) < -slack or left < -slack or left > math.fsum(room) + slack:
        raise UserError(
            f"sparsity {target:g} cannot be met within the given bounds",
            "Widen them (option delta) or choose a target inside.",
        )
    rates = list(lows)
    order = sorted(range(count), key=lambda index: importance[index])
    at = 0
    while at < count and left > 0:
        group = [index for index in order[at:] if importance[index] == importance[order[at]]]
        group_room = math.fsum(room[index] for index in group)
        part = min(left / group_room, 1.0) if group_room > 0 else 0.0
        for index in group:
            rates[index] = lows[index] + part * (highs[index] - lows[index])
        left -= group_room
        at += len(group)
    return rates
