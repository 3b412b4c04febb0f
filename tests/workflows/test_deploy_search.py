"""The search of ``deploy``: what it tries, and that it finds the highest rate within the bound."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsedeploy.workflows.deploy_search import Pair, Space, Trial, best_pair, chosen, nearest, next_trial

RATES = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]


def run(space: Space, perplexity, compared: dict[Pair, float] | None = None) -> dict[Trial, float]:
    results: dict[Trial, float] = {}
    while (trial := next_trial(space, compared or {}, results)) is not None:
        assert trial not in results
        results[trial] = perplexity(trial)
    return results


@given(
    limit=st.integers(0, 60),
    offsets=st.lists(st.integers(0, 40), min_size=6, max_size=6),
    count=st.integers(1, 6),
    diverges=st.integers(0, 6),
    searching=st.integers(0, 3),
    error=st.sampled_from([-100, -3, 0, 3, 100]),
)
def test_the_highest_rate_of_the_best_pair_is_found(
    limit: int, offsets: list[int], count: int, diverges: int, searching: int, error: int
) -> None:
    """Perplexity grows with the rate; methods and allocations differ, some of them search; high rates may diverge.

    An estimate that is wrong about the bound costs trials, and the answer is the same.
    """
    allocations = ["u", "v", "w"]
    space = Space(RATES[:count], ["a", "b"], allocations, float(limit), allocations[3 - searching :])
    pairs = {(m, a): offsets[3 * i + j] for i, m in enumerate("ab") for j, a in enumerate("uvw")}

    def perplexity(trial: Trial) -> float:
        at = RATES.index(trial.rate)
        return math.inf if at >= diverges + 1 else float(pairs[trial.method, trial.allocation] + 5 * at)

    compared = {pair: perplexity(Trial(space.middle, *pair)) + error if pair in pairs else 0.0 for pair in space.pairs}
    results = run(space, perplexity, compared)
    pair = best_pair(space, compared, results)
    if not searching:
        assert compared[pair] == min(compared.values())
        right = (compared[pair] <= limit) == (perplexity(Trial(space.middle, *pair)) <= limit)
        assert len(results) <= space.halvings * (1 if right else 2)
    within = [r for r in space.rates if perplexity(Trial(r, *pair)) <= limit]
    best = chosen(space, compared, results)
    assert (best.rate if best else None) == (max(within) if within else None)


def test_order_and_resumption() -> None:
    space = Space(RATES, ["wanda", "sparsegpt"], ["uniform", "lsa", "evolve"], 12.0, ["evolve"])

    def perplexity(trial: Trial) -> float:
        return 10 + 10 * trial.rate**3 - (trial.allocation == "evolve")

    compared = {pair: 20.0 - (pair == ("sparsegpt", "lsa")) for pair in space.pairs}
    results = run(space, perplexity, compared)
    names = [trial.name for trial in results]
    assert names[:2] == ["sparsegpt-lsa-60", "sparsegpt-evolve-60"]
    assert all(name.startswith("sparsegpt-evolve") for name in names[2:])
    # Cut anywhere, the same trials follow.
    for cut in range(len(results)):
        assert next_trial(space, compared, dict(list(results.items())[:cut])) == list(results)[cut]


@given(
    limit=st.integers(0, 60),
    offset=st.integers(0, 40),
    gain=st.integers(0, 30),
    searching=st.booleans(),
    count=st.integers(1, 6),
)
def test_a_recovery_goes_on_from_the_answer(limit: int, offset: int, gain: int, searching: bool, count: int) -> None:
    """Trained are the rates above the plain answer, one by one, until the first that is outside of the bound."""
    space = Space(RATES[:count], ["a"], ["u"], float(limit), ["u"] if searching else [], "r")

    def perplexity(trial: Trial) -> float:
        return float(offset + 5 * RATES.index(trial.rate) - (gain if trial.recovery else 0))

    results = run(space, perplexity)
    plain = [rate for rate in space.rates if perplexity(Trial(rate, "a", "u")) <= limit]
    trained = [trial.rate for trial in results if trial.recovery]
    within = [rate for rate in space.rates if perplexity(Trial(rate, "a", "u", "r")) <= limit]
    above = [rate for rate in space.rates if rate not in plain]
    assert trained == above[: len([rate for rate in above if rate in within]) + 1]
    best = chosen(space, {}, results)
    assert (best.rate if best else None) == (max([*plain, *within]) if [*plain, *within] else None)
    assert not any(trial.recovery for trial in list(results)[: len(results) - len(trained)]), "training comes last"
    without = Space(space.rates, ["a"], ["u"], space.limit, space.searching)
    assert run(without, perplexity) == {trial: value for trial, value in results.items() if trial.recovery is None}


def test_an_estimate_saves_the_middle_rate() -> None:
    space = Space(RATES, ["wanda", "alps"], ["uniform"], 12.0)
    compared = {("wanda", "uniform"): 13.0, ("alps", "uniform"): 11.0}
    found = run(space, lambda trial: 8 + 5 * trial.rate, compared)  # within up to 80 %
    assert [trial.name for trial in found] == ["alps-uniform-70", "alps-uniform-80"]
    found = run(space, lambda trial: 10 + 3 * trial.rate, compared)  # within up to 60 %, which is pruned in the end
    assert [trial.name for trial in found] == ["alps-uniform-70", "alps-uniform-60"]


def test_nothing_within_the_bound_names_the_nearest() -> None:
    space = Space(RATES, ["wanda"], ["uniform"], 1.0)
    results = run(space, lambda trial: 10 + trial.rate)
    assert chosen(space, {}, results) is None
    assert nearest(results) == Trial(0.3, "wanda", "uniform")


def test_a_single_rate_is_one_trial() -> None:
    space = Space([0.5], ["wanda"], ["uniform"], 11.0)
    assert list(run(space, lambda trial: 10.0)) == [Trial(0.5, "wanda", "uniform")]
    assert chosen(space, {}, {}) is None


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), ("0.05", 0.05), ("0", 0.0), ("150%", 1.5)])
def test_bound(text: str, value: float) -> None:
    from sparsedeploy.workflows.deploy_request import parse_bound

    assert parse_bound(text) == pytest.approx(value)
