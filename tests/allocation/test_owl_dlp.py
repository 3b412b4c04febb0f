"""OWL and DLP from Wanda scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedeploy.allocation.base import Allocator
from sparsedeploy.allocation.budget import plan_from_allocation
from sparsedeploy.allocation.dlp import DLP, DLPOptions
from sparsedeploy.allocation.owl import OWL, OWLOptions
from sparsedeploy.allocation.select import lower_median
from sparsedeploy.calibration.driver import LayerContext
from tests.allocation.shapes import llama_layers, view


def layer(scale: float = 1.0, seed: int = 0, heavy: float = 0.0) -> LayerContext:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(24, 32, generator=generator) * scale for name in ("q", "k", "down")}
    weights["q"][:, :2] *= 1 + heavy
    x = torch.randn(64, 32, generator=generator)
    return view(weights, dict.fromkeys(weights, x), "sum_squares")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 2**100, width=32), min_size=1, max_size=20), min_size=1, max_size=4),
)
def test_lower_median_of_parts_is_that_of_the_whole(parts: list[list[float]]) -> None:
    tensors = [torch.tensor(part) for part in parts]
    assert lower_median(lambda: iter(tensors)) == torch.cat(tensors).median().item()


def test_lower_median_of_many_equal_and_of_bad_values() -> None:
    tensors = [torch.zeros(5), torch.full((4,), 2.5), -torch.zeros(1)]
    assert lower_median(lambda: tensors) == 0.0
    assert math.isnan(lower_median(lambda: [torch.tensor([1.0, math.inf])]))


@pytest.mark.parametrize("reduce", ["median", "mean"])
def test_dlp_measures_all_scores_of_a_layer_together(reduce: str) -> None:
    one = layer()
    scores = torch.cat(
        [
            (linear.weight.abs() * one.statistics[name].mean_square.sqrt()).flatten()
            for name, linear in one.linears.items()
        ]
    ).double()
    expected = scores.median() if reduce == "median" else scores.mean()
    assert DLP(DLPOptions(reduce)).measure(one) == pytest.approx(expected.item(), rel=1e-6)  # type: ignore[arg-type]


def test_owl_counts_outliers_of_the_whole_layer() -> None:
    one = layer(heavy=5)
    scores = torch.cat(
        [
            (linear.weight.abs() * one.statistics[name].mean_square.sqrt()).flatten()
            for name, linear in one.linears.items()
        ]
    )
    expected = 100 * (scores > 3 * scores.mean()).float().mean().item()
    assert expected > 0
    assert OWL(OWLOptions(m=3)).measure(one) == pytest.approx(expected)


def rates(allocator: Allocator, layers: list[LayerContext], sparsity: float = 0.7) -> list[float]:
    shapes = llama_layers(len(layers), 64, 128)
    allocated = allocator.allocate([allocator.measure(one) for one in layers], shapes, sparsity)
    return [unit.value + sparsity for unit in allocated.units]


@pytest.mark.parametrize(
    ("allocator", "width"),
    [(OWL(OWLOptions(0.08, 3)), 0.16), (DLP(DLPOptions()), 0.30), (DLP(DLPOptions("mean", 0.1)), 0.2)],
)
def test_mean_and_range(allocator: Allocator, width: float) -> None:
    got = rates(allocator, [layer(1 + i / 5, seed=i, heavy=3 * i) for i in range(5)])
    assert sum(got) / 5 == pytest.approx(0.7, abs=1e-12)
    assert max(got) - min(got) == pytest.approx(width, abs=1e-12)


def test_owl_protects_outliers_and_ignores_scale() -> None:
    layers = [layer(seed=i, heavy=h) for i, h in enumerate((0, 9, 4))]
    outliers = [OWL(OWLOptions(m=3)).measure(one) for one in layers]
    got = rates(OWL(OWLOptions(m=3)), layers)
    assert got.index(min(got)) == outliers.index(max(outliers))
    scaled = [layer(seed=i, heavy=h, scale=s) for i, (h, s) in enumerate(((0, 1), (9, 8), (4, 1)))]
    assert rates(OWL(OWLOptions(m=3)), scaled) == got  # a power of two scales the scores exactly


def test_dlp_prunes_large_scores_and_feels_scale() -> None:
    layers = [layer(seed=i, scale=1 + i) for i in range(3)]
    got = rates(DLP(DLPOptions()), layers)
    assert got == sorted(got)
    together = [layer(seed=i, scale=4.0 * (1 + i)) for i in range(3)]
    assert rates(DLP(DLPOptions()), together) == got
    one_larger = [layer(seed=i, scale=(1 + i) * (2 if i == 1 else 1)) for i in range(3)]
    assert rates(DLP(DLPOptions()), one_larger) != got


def test_dlp_golden_values_of_llama_2_7b() -> None:
    """The published densities have mean 0.3 and range 0.3, layer 0 is densest at 0.4652, the last has 0.1723.

    Scores with these extremes and this mean must give the published sparsities: 0.5348, 0.8348 and 0.8277.
    """
    # Layer 0 lowest, layer 30 highest, the last just below it, the others so that the mean density deviation fits.
    lowest, highest = 0.1, 0.4
    last = highest - (0.8348 - 0.8277) / 0.3 * (highest - lowest)
    mean = lowest + (1 - 0.1348 / 0.3) * (highest - lowest)
    middle = (32 * mean - lowest - highest - last) / 29
    scores = [lowest, *[middle] * 29, highest, last]
    allocated = DLP(DLPOptions()).allocate(scores, llama_layers(), 0.7)
    plan = plan_from_allocation(allocated, llama_layers(), 0.7, allocation="dlp")
    by_layer = [target.sparsity for target in plan.targets][::7]
    assert by_layer[0] == pytest.approx(0.5348, abs=3e-4)  # counts per row come in steps of 1/4096
    assert by_layer[30] == pytest.approx(0.8348, abs=3e-4)
    assert by_layer[31] == pytest.approx(0.8277, abs=3e-4)
    assert max(by_layer) - min(by_layer) == pytest.approx(0.30, abs=3e-4)
    assert plan.achieved == pytest.approx(0.7, abs=1e-6)


@pytest.mark.parametrize("allocator", [OWL(OWLOptions()), DLP(DLPOptions()), DLP(DLPOptions(strength=0.0))])
def test_equal_scores_or_no_strength_give_uniform(allocator: Allocator) -> None:
    scores = [0.1, 0.1, 0.1] if not isinstance(allocator, DLP) or allocator.options.strength is None else [1, 2, 3]
    assert {unit.value for unit in allocator.allocate(scores, llama_layers(3), 0.7).units} == {0.0}
