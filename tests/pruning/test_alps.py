"""ALPS and least squares on a mask: monotone, exact on small problems, never worse than where they began."""

import itertools

import pytest
import torch

from sparsedeploy.calibration.statistics import InputStatistics
from sparsedeploy.errors import UserError
from sparsedeploy.masks import broken_groups
from sparsedeploy.plan import NM, ModuleTarget
from sparsedeploy.pruning import PRUNERS, Pruned
from sparsedeploy.pruning.least_squares import conjugate_gradients, reconstruct, reconstructed, scale_hessian
from sparsedeploy.pruning.selection import keep_all_but_smallest
from sparsedeploy.pruning.sweep import hessian_factor
from sparsedeploy.pruning.sweep import solve as sparsegpt_solve

ROWS, COLUMNS = 48, 128


def inputs(seed: int, tokens: int = 1024, columns: int = COLUMNS) -> torch.Tensor:
    """float64 ``[tokens, columns]`` with a decaying spectrum in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64)).Q
    spectrum = (torch.arange(columns, dtype=torch.float64) + 1) ** -0.5
    return torch.randn(tokens, columns, generator=generator, dtype=torch.float64) * spectrum @ basis.T


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)


def damped(hessian: torch.Tensor) -> torch.Tensor:
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def error_of(change: torch.Tensor, hessian: torch.Tensor) -> float:
    return 0.5 * torch.trace(change @ damped(hessian) @ change.T).item()


def statistics(x: torch.Tensor) -> InputStatistics:
    stats = InputStatistics(x.shape[1], "hessian", x.device)
    stats.add(x.float().reshape(4, -1, x.shape[1]), 4)
    return stats


def run(name: str, target: ModuleTarget, w: torch.Tensor, stats: InputStatistics, **options: object) -> Pruned:
    method = PRUNERS.get(name)
    return method.function(w, stats, target, method.make_options(options))


def target_of(zeros: int, pattern: NM | None = None) -> ModuleTarget:
    return ModuleTarget("layers.0.q", ROWS, COLUMNS, zeros, pattern)


@pytest.mark.parametrize("dead", [(), (5, 40)], ids=["live", "dead"])
def test_reconstruction_is_the_direct_least_squares_solution(dead: tuple[int, ...]) -> None:
    w, x = weight(), inputs(0)
    x[:, list(dead)] = 0
    hessian = 2 * x.T @ x
    mask = keep_all_but_smallest(w.abs(), 90)
    found, error = reconstruct(w, mask, scale_hessian(hessian), iterations=500, tolerance=1e-13)
    whole = hessian.clone()
    whole.diagonal()[list(dead)] = 1
    whole += 0.01 * whole.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    dense = w.clone()
    dense[:, list(dead)] = 0
    for row, kept, answer in zip(dense, mask, found, strict=True):
        direct = torch.linalg.solve(whole[kept][:, kept], (whole @ row)[kept])
        torch.testing.assert_close(answer[kept], direct, rtol=1e-6, atol=1e-6)
        assert not answer[~kept].any()
    change = found - dense
    assert error == pytest.approx(0.5 * torch.trace(change @ whole @ change.T).item(), rel=1e-6)


@pytest.mark.parametrize("pattern", [None, NM(2, 4)], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_never_worse_than_sparsegpt_on_its_own_mask(seed: int, pattern: NM | None) -> None:
    w, x = weight(seed), inputs(seed)
    hessian = 2 * x.T @ x
    factor, dead = hessian_factor(hessian, 0.01, "m")
    theirs, mask, loss, _ = sparsegpt_solve(w, factor, dead, target_of(64, pattern), 32)
    scaled = scale_hessian(hessian)
    errors = [reconstruct(w, mask, scaled, start=theirs, iterations=count)[1] for count in range(12)]
    assert errors[0] == pytest.approx(loss, rel=1e-6)
    assert all(after < before for before, after in itertools.pairwise(errors))


def test_the_reported_error_is_the_true_one_in_float32_too() -> None:
    w, x = weight().float(), inputs(1)
    hessian = (2 * x.T @ x).float()
    mask = keep_all_but_smallest(w.abs(), 90)
    found, error = reconstruct(w, mask, scale_hessian(hessian))
    assert error == pytest.approx(error_of((found - w).double(), hessian.double()), rel=1e-3)


def test_a_row_that_is_solved_stays_while_others_go_on() -> None:
    x = inputs(2)
    scaled = scale_hessian(2 * x.T @ x)
    dense = weight() * scaled.scale
    dense[0] = 0
    mask = keep_all_but_smallest(dense.abs(), 64)
    solved, before, after = conjugate_gradients(dense, dense * mask, mask, scaled.matrix, iterations=20)
    assert torch.isfinite(solved).all()
    assert not solved[0].any()
    assert after < before


def test_a_mask_that_keeps_everything_keeps_the_weights() -> None:
    w, x = weight(), inputs(3)
    found, error = reconstruct(w, torch.ones_like(w, dtype=torch.bool), scale_hessian(2 * x.T @ x))
    torch.testing.assert_close(found, w, rtol=1e-12, atol=1e-12)
    assert error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("zeros", "pattern"), [(64, None), (90, None), (115, None), (64, NM(2, 4)), (96, NM(2, 8))])
def test_less_error_than_sparsegpt(seed: int, zeros: int, pattern: NM | None) -> None:
    w, x = weight(seed).float(), inputs(seed)
    ours = run("alps", target_of(zeros, pattern), w, statistics(x))
    theirs = run("sparsegpt", target_of(zeros, pattern), w, statistics(x))
    hessian = statistics(x).hessian.double()
    for pruned in (ours, theirs):
        assert pruned.loss == pytest.approx(error_of((pruned.weight - w).double(), hessian), rel=1e-3)
    assert ours.loss < theirs.loss
    assert int((~ours.mask).sum()) == zeros * ROWS
    if pattern:
        assert broken_groups(ours.mask, pattern.n, pattern.m) == 0


def test_the_papers_schedule_loses_less_still_and_rows_share_alike_when_asked() -> None:
    w, x = weight().float(), inputs(0)
    short, paper, rows = (
        run("alps", target_of(90), w, statistics(x), **options)
        for options in ({}, {"schedule": "paper", "penalty": 0.1, "relaxation": 1.0}, {"scope": "row"})
    )
    assert paper.loss < short.loss < rows.loss
    assert torch.equal((~rows.mask).sum(dim=1), torch.full((ROWS,), 90))


def test_never_worse_than_where_it_began_whatever_the_penalty() -> None:
    """Penalties that make the splitting useless: the largest weights of the scaled matrix, fitted, are the floor."""
    w, x = weight().float(), inputs(0)
    hessian = statistics(x).hessian
    scaled = scale_hessian(hessian)
    first = keep_all_but_smallest((w * scaled.scale).abs().reshape(1, -1), 90 * ROWS).reshape(w.shape)
    floor = error_of((w * first - w).double(), hessian.double())
    for options in ({"penalty": 1e-7, "last": 1e-7}, {"penalty": 1e30, "last": 1e38}, {"penalty": 1e-7, "last": 1e30}):
        pruned = run("alps", target_of(90), w, statistics(x), **options)
        assert pruned.loss <= floor
        assert int((~pruned.mask).sum()) == 90 * ROWS


def test_linears_that_share_an_input_get_what_each_would_get_alone() -> None:
    w, x = weight().float(), inputs(4)
    shared = statistics(x)
    shared.linears = 2
    first, second = run("alps", target_of(90), w, shared), run("alps", target_of(90), w, shared)
    alone = run("alps", target_of(90), w, statistics(x))
    for pruned in (second, alone):
        assert torch.equal(first.mask, pruned.mask)
        assert torch.equal(first.weight, pruned.weight)


def test_dead_inputs_go_first() -> None:
    x = inputs(5)
    x[:, [3, 17]] = 0
    pruned = run("alps", target_of(8), weight().float(), statistics(x))
    assert not pruned.mask[:, [3, 17]].any()
    assert torch.isfinite(pruned.weight).all()


def test_what_is_not_finite_is_refused_by_name() -> None:
    w, x = weight().float(), inputs(6)
    broken = w.clone()
    broken[3, 4] = torch.nan
    with pytest.raises(UserError, match=r"finite weights for layers\.0\.q"):
        run("alps", target_of(64), broken, statistics(x))
    pruned = Pruned(torch.ones_like(w, dtype=torch.bool), w)
    with pytest.raises(UserError, match=r"least-squares weights of layers\.0\.q are not finite"):
        reconstructed(pruned, broken, scale_hessian(statistics(x).hessian), "layers.0.q")
