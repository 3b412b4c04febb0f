"""ATP: the progression over depth, its legal range, and the search for beta."""

import itertools
import math

import pytest

from sparsedeploy.allocation.atp import ATP, ATPOptions, largest_beta, search_beta, trial_betas
from sparsedeploy.allocation.budget import plan_from_allocation
from sparsedeploy.errors import UserError
from sparsedeploy.plan import SparsityPlan
from tests.allocation.shapes import llama_layers


@pytest.mark.parametrize(
    ("sparsity", "layers", "bound", "trials", "last_rate"),
    [
        (0.7, 32, 0.01935, 9, 0.979),
        (0.7, 40, 0.01538, 7, 0.973),
        (0.7, 80, 0.00759, 3, 0.937),
        (0.5, 32, 0.03226, 16, 0.996),
        (0.8, 32, 0.01290, 6, 0.986),
    ],
)
def test_published_trials(sparsity: float, layers: int, bound: float, trials: int, last_rate: float) -> None:
    assert largest_beta(sparsity, layers) == pytest.approx(bound, abs=5.1e-6)
    betas = trial_betas(sparsity, layers)
    assert len(betas) == trials
    assert betas == pytest.approx([0.002 * (i + 1) for i in range(trials)])
    assert sparsity + betas[-1] * (layers - 1) / 2 == pytest.approx(last_rate, abs=5.1e-4)
    assert trial_betas(sparsity, layers, at_most=16) == betas


def test_shallow_models_get_spread_trials() -> None:
    betas = trial_betas(0.7, 6, at_most=16)
    assert len(betas) == 16
    assert betas[-1] == pytest.approx(largest_beta(0.7, 6))
    assert trial_betas(0.7, 1) == []


@pytest.mark.parametrize("beta", [0.0, 0.004, 0.018])
def test_rates_are_an_arithmetic_progression_with_the_target_as_mean(beta: float) -> None:
    layers = llama_layers(32, 64, 128)
    values = [unit.value for unit in ATP(ATPOptions(beta)).allocate([None] * 32, layers, 0.7).units]
    assert abs(math.fsum(values) / 32) < 1e-12
    assert [b - a for a, b in itertools.pairwise(values)] == pytest.approx([beta] * 31, abs=1e-12)


def test_default_beta_is_half_of_the_largest() -> None:
    details = ATP(ATPOptions()).allocate([None] * 32, llama_layers(), 0.7).details
    assert details is not None
    assert details["beta"] == pytest.approx(0.3 / 31)
    single = ATP(ATPOptions()).allocate([None], llama_layers(1), 0.7)
    assert single.units[0].value == 0


def test_at_the_bound_the_last_layer_keeps_something() -> None:
    layers = llama_layers()
    allocated = ATP(ATPOptions(largest_beta(0.7, 32))).allocate([None] * 32, layers, 0.7)
    plan = plan_from_allocation(allocated, layers, 0.7, allocation="atp")
    assert plan.targets[-1].sparsity <= 0.9901
    assert plan.achieved == pytest.approx(0.7, abs=1e-6)


@pytest.mark.parametrize("beta", [-0.001, 0.02])
def test_illegal_beta_is_refused(beta: float) -> None:
    with pytest.raises(UserError, match=r"outside \[0, 1\]") as error:
        ATP(ATPOptions(beta)).allocate([None] * 32, llama_layers(), 0.7)
    assert "Use a beta from 0 to 0.0193548" in str(error.value)


def plan_for(beta: float) -> SparsityPlan:
    layers = llama_layers(8, 64, 128)
    return plan_from_allocation(ATP(ATPOptions(beta)).allocate([None] * 8, layers, 0.5), layers, 0.5, allocation="atp")


def slope(plan: SparsityPlan) -> float:
    return (plan.targets[-1].sparsity - plan.targets[0].sparsity) / 7


def test_search_finds_the_minimum_and_stops_early() -> None:
    betas = [0.01 * (i + 1) for i in range(10)]
    found = search_beta(lambda plan: abs(slope(plan) - 0.03) + 1, plan_for, betas, patience=2)
    assert found.beta == pytest.approx(0.03)
    assert list(found.trials) == pytest.approx([0, 0.01, 0.02, 0.03, 0.04, 0.05])  # two worse ones, then no more
    assert slope(found.plan) == pytest.approx(0.03, abs=0.005)
    everything = search_beta(lambda plan: abs(slope(plan) - 0.03) + 1, plan_for, betas, patience=0)
    assert len(everything.trials) == 11


def test_search_survives_diverged_trials_and_can_choose_uniform() -> None:
    found = search_beta(
        lambda plan: math.nan if slope(plan) > 0.025 else 5 + slope(plan), plan_for, [0.01, 0.03], patience=0
    )
    assert found.beta == 0
    assert found.to_dict()[-1] == {"beta": 0.03, "perplexity": None}
    with pytest.raises(UserError, match="every trial of the beta search diverged"):
        search_beta(lambda plan: math.inf, plan_for, [0.01])


def test_beta_and_search_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="not both"):
        ATPOptions(beta=0.01, search=True)
