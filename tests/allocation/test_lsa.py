"""LSA: the greedy reconstruction error and the rates it gives at three granularities."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedeploy.allocation.budget import plan_from_allocation
from sparsedeploy.allocation.lsa import LSA, LSAOptions, greedy_removal
from sparsedeploy.errors import UserError
from tests.allocation.shapes import llama_layers, view


def problem(
    rows: int = 12, columns: int = 48, tokens: int = 200, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and correlated inputs ``[tokens, columns]``."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    spectrum = torch.arange(1, columns + 1, dtype=torch.float64) ** -0.5
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) * spectrum @ mix
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight.to(dtype), x.to(dtype)


def residual(weight: torch.Tensor, dropped: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """|dropped part times X^T|^2 of every row."""
    return (torch.where(dropped, weight, 0) @ x.T).square().sum(dim=1)


@pytest.mark.parametrize("group", [16, 32, 48, 0, 20])
def test_error_is_the_residual_of_what_was_dropped(group: int) -> None:
    weight, x = problem()
    errors, dropped = greedy_removal(weight, x.T @ x, group=group)
    torch.testing.assert_close(errors, residual(weight, dropped, x), rtol=1e-8, atol=0)
    width = group or 48
    for start in range(0, 48, width):
        part = dropped[:, start : start + width]
        assert (part.sum(dim=1) == part.shape[1] // 2).all()  # a short last group gets its own share


@pytest.mark.parametrize(("group", "of_tail"), [(32, 16), (20, 8), (16, 8)])
def test_reference_tail_drops_as_many_as_from_a_whole_group(group: int, of_tail: int) -> None:
    weight, x = problem()
    errors, dropped = greedy_removal(weight, x.T @ x, group=group, reference_tail=True)
    tail = 48 - (48 % group or group)
    assert (dropped[:, tail:].sum(dim=1) == of_tail).all()  # all 16, all 8; half of it where groups divide the width
    torch.testing.assert_close(errors, residual(weight, dropped, x), rtol=1e-8, atol=0)
    own, _ = greedy_removal(weight, x.T @ x, group=group)
    assert torch.equal(own, errors) == (48 % group == 0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 17), st.sampled_from([0.3, 0.5, 0.7]))
def test_error_identity_on_any_shape(seed: int, columns: int, group: int, removed: float) -> None:
    weight, x = problem(3, columns, 20, seed)
    errors, dropped = greedy_removal(weight, x.T @ x, group=group, removed=removed)
    torch.testing.assert_close(errors, residual(weight, dropped, x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("group", [16, 32])
def test_greedy_beats_wanda_under_the_same_quota(group: int) -> None:
    for seed in range(3):
        weight, x = problem(48, 64, 512, seed)
        errors, _ = greedy_removal(weight, x.T @ x, group=group)
        scores = weight.abs() * x.square().sum(dim=0).sqrt()
        order = scores.reshape(48, -1, group).argsort(dim=2)
        wanda = torch.zeros(48, 64 // group, group, dtype=torch.bool)
        wanda.scatter_(2, order[:, :, : group // 2], True)
        assert errors.sum() < residual(weight, wanda.reshape(48, 64), x).sum()


def test_greedy_is_close_to_and_never_better_than_exhaustive_search() -> None:
    weight, x = problem(4, 8, 40)
    errors, dropped = greedy_removal(weight, x.T @ x, group=0)
    for row in range(4):
        best = min(
            residual(weight[row : row + 1], torch.tensor([[j in gone for j in range(8)]]), x).item()
            for gone in combinations(range(8), 4)
        )
        assert best * (1 - 1e-9) <= errors[row].item() < 3 * best
    assert (dropped.sum(dim=1) == 4).all()


def test_one_group_is_all_columns() -> None:
    weight, x = problem()
    for group in (48, 64):
        for got, expected in zip(
            greedy_removal(weight, x.T @ x, group=0), greedy_removal(weight, x.T @ x, group=group), strict=True
        ):
            assert torch.equal(got, expected)


def test_many_rows_are_split_without_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = problem(37, dtype=torch.float32)
    whole, _ = greedy_removal(weight, x.T @ x)
    monkeypatch.setattr("sparsedeploy.allocation.lsa._ROWS_AT_ONCE", 8)
    threads = torch.get_num_threads()
    split, _ = greedy_removal(weight, x.T @ x)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=0)
    assert torch.get_num_threads() == threads


def test_measuring_shares_the_hessian_of_a_common_input() -> None:
    weight, x = problem(dtype=torch.float32)
    other, y = problem(8, 32, seed=1, dtype=torch.float32)
    weights = {"q": weight, "k": weight[:5] * 2, "o": other}
    measured = LSA(LSAOptions(group=16)).measure(view(weights, {"q": x, "k": x, "o": y}))
    for got, (w, inputs) in zip(measured, ((weight, x), (weight[:5] * 2, x), (other, y)), strict=True):
        errors, _ = greedy_removal(w, 2 * inputs.T @ inputs, group=16)
        assert got == pytest.approx(errors.sum().item(), rel=1e-4)


def test_scale_of_the_hessian_leaves_the_rates() -> None:
    weight, x = problem()
    base, dropped = greedy_removal(weight, x.T @ x)
    scaled, same = greedy_removal(weight, x.T @ x * 4)
    assert torch.equal(scaled, base * 4)
    assert torch.equal(dropped, same)
    layers = llama_layers(3, 64, 128)
    errors = [[float(i + j) for j in range(7)] for i in range(3)]
    fourfold = [[4 * e for e in row] for row in errors]
    for granularity in ("layer", "block", "projection"):
        method = LSA(LSAOptions(granularity))  # type: ignore[arg-type]
        assert method.allocate(errors, layers, 0.7).units == method.allocate(fourfold, layers, 0.7).units


def test_larger_error_means_more_sparsity() -> None:
    """The sign that LSA's abstract hides: I = 1 - E / sum E."""
    layers = llama_layers(4, 64, 128)
    allocated = LSA(LSAOptions()).allocate([[e] * 7 for e in (1.0, 9.0, 4.0, 5.0)], layers, 0.7)
    values = [unit.value for unit in allocated.units]
    assert values[0] < values[2] < values[3] < values[1]
    assert values[1] - values[0] == pytest.approx(0.30)
    assert sum(values) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("key_value", [None, 1024], ids=["7b", "8b-gqa"])
def test_projection_deviations_follow_the_published_formula(key_value: int | None) -> None:
    layers = llama_layers(4, 4096, 14336 if key_value else 11008, key_value)
    errors = [[float(1 + i + 3 * j) for j in range(7)] for i in range(4)]
    allocated = LSA(LSAOptions("projection")).allocate(errors, layers, 0.7)
    flat = torch.tensor(errors, dtype=torch.float64).flatten()
    importance = 1 - flat / flat.sum()
    d = 2 * 0.07 * (importance - importance.min()) / (importance.max() - importance.min())
    sizes = torch.tensor([m.size for layer in layers for m in layer], dtype=torch.float64)
    expected = (0.7 * sizes + (d.mean() - d) * sizes.mean()) / sizes
    got = torch.tensor([unit.value for unit in allocated.units]) + 0.7
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    assert (expected * sizes).sum() / sizes.sum() == pytest.approx(0.7)  # exact before any clamping
    amplification = (sizes.mean() / sizes)[[1, 6]].tolist()
    assert amplification == pytest.approx([7.43, 0.531] if key_value else [1.72, 0.641], abs=0.005)
    plan = plan_from_allocation(allocated, layers, 0.7, allocation="lsa")
    assert abs(plan.achieved - 0.7) * sizes.sum() < 14336  # one row-unit


def test_block_mode_averages_the_members_of_a_block() -> None:
    layers = llama_layers(2, 64, 128, 32)
    errors = [[1.0, 2.0, 3.0, 6.0, 9.0, 9.0, 12.0], [5.0] * 4 + [7.0] * 3]
    averaged = [[3.0] * 4 + [10.0] * 3, errors[1]]
    block = LSA(LSAOptions("block")).allocate(errors, layers, 0.7)
    assert block.units == LSA(LSAOptions("projection")).allocate(averaged, layers, 0.7).units
    values = {unit.modules[0].rpartition(".")[2]: unit.value for unit in block.units[:4]}
    assert values["k_proj"] != values["q_proj"]  # as released: members of unequal size differ
    units = LSA(LSAOptions("block", block_unit=True)).allocate(errors, layers, 0.7).units
    assert [len(unit.modules) for unit in units] == [4, 3, 4, 3]
    plan = plan_from_allocation(
        LSA(LSAOptions("block", block_unit=True)).allocate(errors, layers, 0.7), layers, 0.7, allocation="lsa"
    )
    assert plan.achieved == pytest.approx(0.7, abs=2e-3)


@pytest.mark.parametrize("options", [LSAOptions(), LSAOptions("block"), LSAOptions("projection")])
def test_equal_errors_give_uniform_and_bad_errors_are_refused(options: LSAOptions) -> None:
    layers = llama_layers(2)
    equal = LSA(options).allocate([[3.0] * 7] * 2, layers, 0.7)
    assert {unit.value for unit in equal.units} == {0.0}
    weight, x = problem()
    nan, _ = greedy_removal(weight * 1e200, x.T @ x)
    assert torch.isnan(nan).all()
    with pytest.raises(UserError, match="score of unit 0 is nan"):
        LSA(options).allocate([[nan.sum().item()] * 7, [1.0] * 7], layers, 0.7)
