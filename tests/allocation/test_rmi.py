"""RMI: similarity of representations and the exact bounded allocation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedeploy.allocation.rmi import (
    RMI,
    RMIOptions,
    bounded_allocation,
    centred_gram,
    default_delta,
    linear_cka,
    rmi_importance,
    sequential_least_squares,
)
from sparsedeploy.calibration.driver import LayerContext
from sparsedeploy.errors import UserError
from tests.allocation.shapes import llama_layers


def features(count: int = 4, samples: int = 6, tokens: int = 5, width: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(samples, tokens, width, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_gram_form_equals_feature_form() -> None:
    drawn = features()
    cka = linear_cka(torch.stack([centred_gram(f) for f in drawn]))
    flat = [f.flatten(1) - f.flatten(1).mean(dim=0) for f in drawn]
    for i, a in enumerate(flat):
        for j, b in enumerate(flat):
            expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
            assert cka[i, j].item() == pytest.approx(expected.item(), rel=1e-9)
    assert torch.equal(cka, cka.T)
    torch.testing.assert_close(cka.diagonal(), torch.ones(4, dtype=torch.float64))


def test_scale_and_rotation_do_not_matter() -> None:
    drawn = features()
    rotation, _ = torch.linalg.qr(torch.randn(35, 35, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    turned = [3 * (f.flatten(1) @ rotation).reshape(f.shape) for f in drawn]
    both = [linear_cka(torch.stack([centred_gram(f) for f in group])) for group in (drawn, [*turned[:2], *drawn[2:]])]
    torch.testing.assert_close(both[0], both[1], rtol=1e-9, atol=1e-12)


def test_chunks_of_tokens_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = features(1)[0].float()
    whole = centred_gram(hidden)
    monkeypatch.setattr("sparsedeploy.allocation.rmi._CHUNK", 6 * 7 * 2)
    torch.testing.assert_close(centred_gram(hidden), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(centred_gram(hidden + 100), whole, rtol=1e-3, atol=1e-3)  # a shared offset cancels


def test_redundant_layers_are_less_important() -> None:
    a, b, c, _ = features()
    cka = linear_cka(torch.stack([centred_gram(f) for f in (a, a + 0.01 * b, a + 0.02 * c, b)]))
    importance = rmi_importance(cka)
    assert importance.index(max(importance)) == 3
    for scale in (1.0, 100.0):
        assert sorted(range(4), key=rmi_importance(cka, scale).__getitem__) == sorted(
            range(4), key=importance.__getitem__
        )


problems = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 9), st.floats(0, 0.5), st.floats(0.5, 1)), min_size=1, max_size=7
)


@settings(max_examples=100, deadline=None)
@given(problems, st.floats(0, 1))
def test_allocation_is_the_linear_programme_s_optimum(
    drawn: list[tuple[int, int, float, float]], position: float
) -> None:
    importance = [float(i) for i, *_ in drawn]
    sizes = [p for _, p, *_ in drawn]
    low, high = [x for *_, x, _ in drawn], [y for *_, y in drawn]
    total = sum(sizes)
    ends = [sum(p * b for p, b in zip(sizes, bound, strict=True)) / total for bound in (low, high)]
    target = ends[0] + position * (ends[1] - ends[0])
    rates = bounded_allocation(importance, sizes, target, low, high)
    assert sum(p * x for p, x in zip(sizes, rates, strict=True)) / total == pytest.approx(target, abs=1e-9)
    assert all(a - 1e-12 <= x <= b + 1e-12 for a, x, b in zip(low, rates, high, strict=True))
    for a, x in enumerate(rates):  # optimal: no mass can move from a more to a less important unit
        for b, y in enumerate(rates):
            assert importance[a] >= importance[b] or x >= high[a] - 1e-9 or y <= low[b] + 1e-9


def test_rates_are_bang_bang_and_follow_the_order_alone() -> None:
    importance = [0.9, 0.2, 0.5, 0.7]
    rates = bounded_allocation(importance, [1] * 4, 0.7, 0.67, 0.73)
    assert rates == pytest.approx([0.67, 0.73, 0.73, 0.67])
    stretched = bounded_allocation([math.exp(9 * i) for i in importance], [1] * 4, 0.7, 0.67, 0.73)
    assert rates == stretched
    odd = bounded_allocation([3.0, 2.0, 1.0], [1] * 3, 0.7, 0.67, 0.73)
    assert odd == pytest.approx([0.67, 0.70, 0.73])


def test_the_released_solver_meets_the_target_and_stays_near_uniform_where_importances_are_close() -> None:
    pytest.importorskip("scipy")
    close, apart = [1 - 1e-4 * i for i in range(8)], [1 - 0.1 * i for i in range(8)]
    for importance in (close, apart):
        rates = sequential_least_squares(importance, [1] * 8, 0.7, 0.67, 0.73)
        assert sum(rates) / 8 == pytest.approx(0.7, abs=1e-6)
    spread = {
        name: max(rates) - min(rates)
        for name, rates in (
            ("close", sequential_least_squares(close, [1] * 8, 0.7, 0.67, 0.73)),
            ("apart", sequential_least_squares(apart, [1] * 8, 0.7, 0.67, 0.73)),
            ("exact", bounded_allocation(close, [1] * 8, 0.7, 0.67, 0.73)),
        )
    }
    assert spread["close"] < 0.01
    assert spread["apart"] == pytest.approx(0.06, abs=1e-3)
    assert spread["exact"] == pytest.approx(0.06)


def test_equal_importance_is_uniform() -> None:
    assert bounded_allocation([1.0] * 3, [5, 1, 9], 0.7, 0.6, 0.8) == pytest.approx([0.7] * 3)


def test_lower_bounds_of_an_earlier_step_hold() -> None:
    rates = bounded_allocation([1.0, 2.0, 3.0], [1, 1, 1], 0.6, [0.5, 0.5, 0.65], 0.7)
    assert rates == pytest.approx([0.65, 0.5, 0.65])


@pytest.mark.parametrize(("low", "high"), [(0.75, 0.8), (0.1, 0.6), (0.8, 0.6)])
def test_bounds_that_cannot_meet_the_target_are_refused(low: float, high: float) -> None:
    with pytest.raises(UserError, match=r"sparsity 0\.7 cannot be met within the given bounds"):
        bounded_allocation([1.0, 2.0], [1, 1], 0.7, low, high)


def test_windows_by_target() -> None:
    assert [default_delta(s) for s in (0.3, 0.5, 0.55, 0.6, 0.7, 0.9)] == [0.01, 0.01, 0.02, 0.02, 0.03, 0.03]


def layer(hidden: torch.Tensor, outputs: torch.Tensor) -> LayerContext:
    return LayerContext(0, {}, {}, hidden, outputs)


def test_feature_and_samples() -> None:
    a, b, *_ = features()
    assert torch.equal(RMI(RMIOptions()).measure(layer(a, b)), centred_gram(a))
    assert torch.equal(RMI(RMIOptions(feature="output")).measure(layer(a, b)), centred_gram(b))
    assert torch.equal(RMI(RMIOptions(samples=3)).measure(layer(a, b)), centred_gram(a[:3]))


def test_shares_stay_in_the_window_and_rank_by_importance() -> None:
    grams = [centred_gram(f) for f in features()]
    allocated = RMI(RMIOptions()).allocate(grams, llama_layers(4), 0.7)
    assert {round(abs(unit.value), 9) for unit in allocated.units} == {0.03}
    assert len(set(allocated.importance)) == 4
    flat = RMI(RMIOptions(delta=0.0)).allocate(grams, llama_layers(4), 0.7)
    assert all(abs(unit.value) < 1e-12 for unit in flat.units)
    near_one = RMI(RMIOptions()).allocate(grams, llama_layers(4), 0.98)
    assert max(unit.value for unit in near_one.units) <= 0.01 + 1e-12


def test_alike_or_lone_or_bad_sequences_are_refused() -> None:
    one = torch.ones(4, 5, 6)
    with pytest.raises(UserError, match="all alike"):
        linear_cka(torch.stack([centred_gram(one)] * 2))
    with pytest.raises(UserError, match="there is only one"):
        linear_cka(torch.ones(2, 1, 1))
    with pytest.raises(UserError, match="not finite"):
        linear_cka(torch.full((2, 3, 3), math.nan))
