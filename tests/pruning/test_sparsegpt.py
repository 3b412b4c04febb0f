"""SparseGPT in float64: the error identity, block quotas, and its loss against Wanda's."""

import pytest
import torch

from sparsedeploy.calibration.statistics import InputStatistics
from sparsedeploy.errors import UserError
from sparsedeploy.plan import NM, ModuleTarget
from sparsedeploy.pruning.selection import keep_all_but_smallest
from sparsedeploy.pruning.sparsegpt import SparseGPTOptions
from sparsedeploy.pruning.sweep import hessian_factor, solve
from sparsedeploy.registry import PRUNERS

ROWS, COLUMNS, BLOCK = 48, 128, 32


def problem(seed: int, columns: int = COLUMNS) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, Hessian), float64: inputs with a decaying spectrum in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64)).Q
    spectrum = (torch.arange(columns, dtype=torch.float64) + 1) ** -0.5
    x = torch.randn(1024, columns, generator=generator, dtype=torch.float64) * spectrum @ basis.T
    return torch.randn(ROWS, columns, generator=generator, dtype=torch.float64), 2 * x.T @ x


def damped(hessian: torch.Tensor) -> torch.Tensor:
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def target_of(zeros: int, columns: int = COLUMNS, pattern: NM | None = None) -> ModuleTarget:
    return ModuleTarget("layers.0.q", ROWS, columns, zeros, pattern)


@pytest.mark.parametrize(
    ("columns", "pattern", "zeros", "dead"),
    [
        (COLUMNS, None, 90, ()),
        (COLUMNS, NM(2, 4), 64, ()),
        (COLUMNS, NM(2, 8), 96, ()),
        (112, None, 60, ()),
        (COLUMNS, None, 70, (5, 40)),
    ],
    ids=["unstructured", "2:4", "2:8", "ragged", "dead"],
)
def test_loss_is_the_damped_output_error(columns: int, pattern: NM | None, zeros: int, dead: tuple[int, ...]) -> None:
    w, hessian = problem(0, columns)
    hessian[list(dead), :] = 0
    hessian[:, list(dead)] = 0
    factor, found = hessian_factor(hessian, 0.01, "m")
    assert found.nonzero().flatten().tolist() == list(dead)
    new, mask, loss, _ = solve(w, factor, found, target_of(zeros, columns, pattern), BLOCK)
    for index in dead:
        hessian[index, index] = 1
        assert not new[:, index].any()
    start = w.clone()
    start[:, list(dead)] = 0
    change = start - new
    expected = 0.5 * torch.trace(change @ damped(hessian) @ change.T).item()
    assert loss == pytest.approx(expected, rel=1e-6)
    assert not new[~mask].any()


def test_every_block_gets_its_share_within_one_weight() -> None:
    w, hessian = problem(1)
    factor, dead = hessian_factor(hessian, 0.01, "m")
    zeros = 77
    _, mask, _, _ = solve(w, factor, dead, target_of(zeros), BLOCK)
    share = ROWS * BLOCK * zeros / COLUMNS
    for start in range(0, COLUMNS, BLOCK):
        assert abs(int((~mask[:, start : start + BLOCK]).sum()) - share) < 1


@pytest.mark.parametrize("zeros", [64, 90, 102])
def test_beats_wanda_on_the_same_hessian(zeros: int) -> None:
    for seed in range(10):
        w, hessian = problem(seed)
        factor, dead = hessian_factor(hessian, 0.01, "m")
        _, _, loss, _ = solve(w, factor, dead, target_of(zeros), BLOCK)
        mask = keep_all_but_smallest(w.abs() * hessian.diagonal().sqrt(), zeros)
        change = w * ~mask
        assert loss < 0.5 * torch.trace(change @ damped(hessian) @ change.T).item()


def test_nothing_pruned_changes_nothing() -> None:
    w, hessian = problem(2)
    factor, dead = hessian_factor(hessian, 0.01, "m")
    new, mask, loss, _ = solve(w, factor, dead, target_of(0), BLOCK)
    assert torch.equal(new, w)
    assert mask.all()
    assert loss == 0


def test_a_rank_deficient_hessian_is_damped_and_a_broken_one_refused() -> None:
    x = torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(0))
    factor, _ = hessian_factor(x.T @ x, 0.01, "m")
    assert torch.isfinite(factor).all()
    with pytest.raises(UserError, match="Hessian of m cannot be factorised"):
        hessian_factor(-torch.eye(4) - torch.ones(4, 4), 0.01, "m")


def test_a_block_that_m_does_not_divide_is_refused() -> None:
    stats = InputStatistics(24, "hessian", torch.device("cpu"))
    stats.add(torch.randn(3, 30, 24), 3)
    target = ModuleTarget("m", 2, 24, 12, NM(4, 8))
    with pytest.raises(UserError, match="block of 12 columns is not divisible by 8"):
        PRUNERS.get("sparsegpt").function(torch.randn(2, 24), stats, target, SparseGPTOptions(block=12))


def test_the_answer_is_the_papers_sweep_over_the_inverse() -> None:
    """Algorithm 1 of the paper, written down as it stands, column by column on U."""
    w, hessian = problem(3)
    factor, dead = hessian_factor(hessian, 0.01, "m")
    zeros = 80
    new, mask, loss, _ = solve(w, factor, dead, target_of(zeros), BLOCK)
    u = torch.linalg.cholesky(torch.linalg.inv(damped(hessian)), upper=True)
    expected, errors = w.clone(), torch.zeros_like(w)
    for start in range(0, COLUMNS, BLOCK):
        block = slice(start, start + BLOCK)
        count = zeros * ROWS * (start + BLOCK) // COLUMNS - zeros * ROWS * start // COLUMNS
        order = (expected[:, block] / u.diagonal()[block]).square().flatten().argsort(stable=True)
        kept = torch.ones(ROWS * BLOCK, dtype=torch.bool)
        kept[order[:count]] = False
        kept = kept.reshape(ROWS, BLOCK)
        assert torch.equal(kept, mask[:, block])
        for j in range(start, start + BLOCK):
            errors[:, j] = torch.where(kept[:, j - start], 0, expected[:, j] / u[j, j])
            expected[:, j:] -= errors[:, j, None] * u[None, j, j:]
    torch.testing.assert_close(new, expected * mask, rtol=1e-8, atol=1e-8)
    assert loss == pytest.approx(0.5 * errors.square().sum().item(), rel=1e-8)


def test_taking_the_hessian_leaves_the_sums_of_squares() -> None:
    stats = InputStatistics(24, "hessian", torch.device("cpu"))
    stats.add(torch.randn(3, 30, 24, generator=torch.Generator().manual_seed(0)), 3)
    whole, squares = stats.hessian, stats.mean_square
    assert torch.equal(stats.consume_hessian().triu(), whole.triu())
    assert torch.equal(stats.mean_square, squares)
    with pytest.raises(ValueError, match="no Hessian"):
        stats.consume_hessian()
