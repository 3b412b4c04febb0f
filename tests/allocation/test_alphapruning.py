"""AlphaPruning: power-law exponents of weight spectra, and the rates they give."""

import math

import numpy as np
import pytest
import torch

from sparsedeploy.allocation.alphapruning import (
    AlphaPruning,
    AlphaPruningOptions,
    eigenvalues,
    factors,
    tail_exponent,
)
from sparsedeploy.allocation.budget import plan_from_allocation
from sparsedeploy.errors import UserError
from tests.allocation.shapes import llama_layers, view


def gaussian(rows: int = 256, columns: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def pareto(exponent: float, count: int = 2000) -> torch.Tensor:
    """Quantiles of the density p(x) ~ x^-exponent, x >= 1: a sample without luck."""
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (1 - quantiles) ** (-1 / (exponent - 1))


def slow_exponent(values: np.ndarray, lower: float, upper: float) -> float:
    """The definition, one candidate at a time."""
    best = (math.inf, math.nan)
    count = len(values)
    for i in range(count - 1):
        if not lower <= values[i] <= upper:
            continue
        tail = values[i:]
        n = count - i
        alpha = 1 + n / (np.log(tail).sum() - n * np.log(values[i]))
        distance = np.abs(1 - (tail / values[i]) ** (1 - alpha) - np.arange(n) / n).max()
        best = min(best, (distance, alpha))
    return best[1]


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30)])
def test_eigenvalues_are_squared_singular_values(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape)
    expected = torch.linalg.svdvals(weight.double()).square().flip(0)
    torch.testing.assert_close(eigenvalues(weight), expected, rtol=1e-6, atol=0)
    intended = expected[expected > 1e-5 * expected[-1]]
    torch.testing.assert_close(eigenvalues(weight, "intended"), intended, rtol=1e-9, atol=0)


def test_the_reference_keeps_small_eigenvalues() -> None:
    weight = torch.diag(torch.tensor([1.0, 1e-3, 1e-5]))
    assert len(eigenvalues(weight)) == 3
    assert len(eigenvalues(weight, "intended")) == 1


def test_rank_deficient_matrices_lose_their_zeros() -> None:
    weight = gaussian(64, 10) @ gaussian(10, 80)
    assert len(eigenvalues(weight)) == 10
    assert math.isfinite(tail_exponent(eigenvalues(weight)))


@pytest.mark.parametrize("bound", ["reference", "intended"])
def test_search_equals_the_definition(bound: str) -> None:
    values = eigenvalues(gaussian(60, 90))
    logs = np.log10(values.numpy())
    counts, edges = np.histogram(logs, bins=100)
    start = 10 ** edges[counts.argmax()]
    lower = math.log10(0.95 * start) if bound == "reference" else 0.95 * start
    expected = slow_exponent(values.numpy(), lower, 1.5 * start)
    assert tail_exponent(values, lower_bound=bound) == pytest.approx(expected, rel=1e-9)


def test_the_released_lower_bound_lets_smaller_eigenvalues_compete() -> None:
    values = eigenvalues(gaussian(128, 160, seed=1))
    assert tail_exponent(values, lower_bound="reference") == pytest.approx(3.334, abs=1e-3)
    assert tail_exponent(values, lower_bound="intended") == pytest.approx(3.608, abs=1e-3)


def test_only_the_intended_bound_ignores_the_scale_of_the_weights() -> None:
    """A power law with a bump far up its tail: the bump is the histogram's peak, the best fit starts at the bottom."""
    law = pareto(2.0, 300)
    bump = torch.linspace(20, 20.2, 40, dtype=torch.float64)
    values = torch.cat([law[law < 100], bump]).sort().values
    scaled = [values, values * 2.0**-7]
    intended = [tail_exponent(v, lower_bound="intended") for v in scaled]
    assert intended[0] == pytest.approx(intended[1], rel=1e-9)
    # Its bound, a logarithm, cuts the bottom off at one scale and not at the other.
    reference = [tail_exponent(v, lower_bound="reference") for v in scaled]
    assert reference[0] != pytest.approx(reference[1], rel=1e-3)


@pytest.mark.parametrize("exponent", [2.0, 3.0, 4.5])
@pytest.mark.parametrize("bound", ["reference", "intended"])
def test_pareto_tails_are_recovered(exponent: float, bound: str) -> None:
    assert tail_exponent(pareto(exponent), lower_bound=bound) == pytest.approx(exponent, rel=0.05)


def test_mid_metric_takes_the_upper_half() -> None:
    values = eigenvalues(gaussian(40, 60))
    tail = values[20:].log()
    expected = 1 + 20 / (tail.sum() - 20 * tail[0]).item()
    assert tail_exponent(values, "alpha_mid") == pytest.approx(expected, rel=1e-12)


def test_layer_metric_is_the_mean_over_its_linears() -> None:
    weights = {"model.layers.0.a": gaussian(16, 24), "model.layers.0.b": gaussian(24, 16, seed=1)}
    method = AlphaPruning(AlphaPruningOptions())
    measured = method.measure(view(weights))
    assert measured == [tail_exponent(eigenvalues(weight)) for weight in weights.values()]


def test_golden_values_of_llama_2_7b() -> None:
    """Layer exponents in [2.136, 4.334], eps 0.3, 70 %: rates in [0.4619, 0.8578], layer 0 lowest, last 0.7046."""
    scale = 0.4619 / 0.7  # the multiplier that the published rates imply
    last = 2.136 + (0.7046 / scale - 0.7) / 0.6 * (4.334 - 2.136)
    others = (32 * 0.7 / scale - 0.7 - 1.3 - 0.7046 / scale) / 29  # factors that make the weighted mean 0.7
    middle = 2.136 + (others - 0.7) / 0.6 * (4.334 - 2.136)
    alphas = [2.136, *[middle] * 15, 4.334, *[middle] * 14, last]
    measured = [[alpha] * 7 for alpha in alphas]
    layers = llama_layers()
    plan = plan_from_allocation(
        AlphaPruning(AlphaPruningOptions()).allocate(measured, layers, 0.7), layers, 0.7, allocation="alphapruning"
    )
    rates = [target.sparsity for target in plan.targets][::7]
    assert rates[0] == min(rates) == pytest.approx(0.4619, abs=3e-4)
    assert max(rates) == pytest.approx(0.8578, abs=3e-4)
    assert rates[31] == pytest.approx(0.7046, abs=3e-4)
    assert plan.achieved == pytest.approx(0.7, abs=1e-6)
    high = plan_from_allocation(
        AlphaPruning(AlphaPruningOptions()).allocate(measured, layers, 0.8), layers, 0.8, allocation="alphapruning"
    )
    assert max(target.sparsity for target in high.targets) == pytest.approx(0.9803, abs=5e-4)
    above = plan_from_allocation(
        AlphaPruning(AlphaPruningOptions()).allocate(measured, layers, 0.85), layers, 0.85, allocation="alphapruning"
    )
    assert max(target.sparsity for target in above.targets) <= 0.9901  # without the clamp it would exceed 1
    assert above.achieved == pytest.approx(0.85, abs=1e-6)


def test_factors_span_the_strength() -> None:
    got = factors([2.0, 5.0, 3.0], 0.3)
    assert max(got) / min(got) == pytest.approx(1.3 / 0.7)
    assert factors([2.0, 2.0], 0.3) == [1.0, 1.0]
    assert factors([2.0, 5.0], 0.0) == [1.0, 1.0]


def test_projection_granularity_gives_each_linear_its_own_rate() -> None:
    layers = llama_layers(2, 64, 128)
    measured = [[2.0 + i for i in range(7)], [3.0] * 7]
    allocated = AlphaPruning(AlphaPruningOptions(granularity="projection")).allocate(measured, layers, 0.7)
    assert len(allocated.units) == 14
    assert allocated.units[0].value < allocated.units[6].value


def test_a_zero_matrix_is_refused() -> None:
    method = AlphaPruning(AlphaPruningOptions())
    bad = method.measure(view({"a": torch.zeros(8, 8)}))
    with pytest.raises(UserError, match="score of unit 0 is nan"):
        method.allocate([bad], [[*llama_layers(1)[0][:1]]], 0.5)
