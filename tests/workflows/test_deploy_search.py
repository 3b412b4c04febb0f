"""The search of ``deploy``: what it tries, and that it finds the highest rate within the bound."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsedeploy.workflows.deploy_search import Space, Trial, best_pair, chosen, nearest, next_trial

RATES = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]


def run(space: Space, perplexity) -> dict[Trial, float]:
    results: dict[Trial, float] = {}
    while (trial := next_trial(space, results)) is not None:
        assert trial not in results
        results[trial] = perplexity(trial)
    return results


@given(
    limit=st.integers(0, 60),
    offsets=st.lists(st.integers(0, 40), min_size=6, max_size=6),
    count=st.integers(1, 6),
    diverges=st.integers(0, 6),
)
def test_the_highest_rate_of_the_best_pair_is_found(limit: int, offsets: list[int], count: int, diverges: int) -> None:
    """Perplexity grows with the rate; methods and allocations differ; the highest rates may diverge."""
    space = Space(RATES[:count], ["a", "b"], ["u", "v", "w"], float(limit))
    pairs = {(m, a): offsets[3 * i + j] for i, m in enumerate("ab") for j, a in enumerate("uvw")}

    def perplexity(trial: Trial) -> float:
        at = RATES.index(trial.rate)
        return math.inf if at >= diverges + 1 else float(pairs[trial.method, trial.allocation] + 5 * at)

    results = run(space, perplexity)
    assert len(results) <= space.most_trials
    method, allocation = best_pair(space, results)
    within = [r for r in space.rates if perplexity(Trial(r, method, allocation)) <= limit]
    best = chosen(space, results)
    assert (best.rate if best else None) == (max(within) if within else None)


def test_order_and_resumption() -> None:
    space = Space(RATES, ["wanda", "sparsegpt"], ["uniform", "lsa"], 12.0)

    def perplexity(trial: Trial) -> float:
        return 10 + 10 * trial.rate**3 - (trial.method == "sparsegpt") - (trial.allocation == "lsa") * 0.5

    results = run(space, perplexity)
    names = [trial.name for trial in results]
    assert names[:3] == ["wanda-uniform-60", "sparsegpt-uniform-60", "sparsegpt-lsa-60"]
    assert all(name.startswith("sparsegpt-lsa") for name in names[2:])
    # Cut anywhere, the same trials follow.
    for cut in range(len(results)):
        assert next_trial(space, dict(list(results.items())[:cut])) == list(results)[cut]


def test_nothing_within_the_bound_names_the_nearest() -> None:
    space = Space(RATES, ["wanda"], ["uniform"], 1.0)
    results = run(space, lambda trial: 10 + trial.rate)
    assert chosen(space, results) is None
    assert nearest(results) == Trial(0.3, "wanda", "uniform")


def test_a_single_rate_is_one_trial() -> None:
    space = Space([0.5], ["wanda"], ["uniform"], 11.0)
    assert space.most_trials == 1
    assert list(run(space, lambda trial: 10.0)) == [Trial(0.5, "wanda", "uniform")]
    assert chosen(space, {}) is None


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), ("0.05", 0.05), ("0", 0.0), ("150%", 1.5)])
def test_bound(text: str, value: float) -> None:
    from sparsedeploy.workflows.deploy_request import parse_bound

    assert parse_bound(text) == pytest.approx(value)
