"""Every registered pruner: exact counts, pattern validity, determinism, and zeros that survive the cast."""

import pytest
import torch

from sparsedeploy.calibration.statistics import InputStatistics
from sparsedeploy.masks import broken_groups
from sparsedeploy.plan import NM, ModuleTarget
from sparsedeploy.pruning import Pruned
from sparsedeploy.pruning.selection import keep_all_but_smallest, keep_n_of_m
from sparsedeploy.registry import PRUNERS

ROWS, COLUMNS = 12, 64
PATTERNS = [NM(2, 4), NM(4, 8), NM(2, 8), NM(1, 4), NM(3, 8), NM(4, 4)]


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)).to(dtype)


def statistics(columns: int = COLUMNS, dead: tuple[int, ...] = ()) -> InputStatistics:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(6, 40, columns, generator=generator) * (torch.arange(columns) + 1.0) ** -0.5
    x[..., list(dead)] = 0
    stats = InputStatistics(columns, "hessian", x.device)
    stats.add(x, 6)
    return stats


def run(name: str, target: ModuleTarget, w: torch.Tensor, stats: InputStatistics, **options: object) -> Pruned:
    method = PRUNERS.get(name)
    return method.function(w, stats, target, method.make_options(options))


def target_of(zeros_per_row: int, pattern: NM | None = None) -> ModuleTarget:
    return ModuleTarget("m", ROWS, COLUMNS, zeros_per_row, pattern)


@pytest.mark.parametrize("name", PRUNERS.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zeros", [0, 1, 19, 45, COLUMNS - 1])
def test_exact_counts_and_zeros_after_the_cast(name: str, dtype: torch.dtype, zeros: int) -> None:
    w = weight(dtype)
    before = w.clone()
    pruned = run(name, target_of(zeros), w, statistics())
    assert int((~pruned.mask).sum()) == zeros * ROWS
    assert pruned.weight.dtype == dtype
    assert not pruned.weight[~pruned.mask].any()
    assert torch.equal(w, before)
    again = run(name, target_of(zeros), w, statistics())
    assert torch.equal(again.mask, pruned.mask)
    assert torch.equal(again.weight, pruned.weight)


@pytest.mark.parametrize("name", PRUNERS.names())
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_n_is_what_is_kept(name: str, pattern: NM) -> None:
    zeros = COLUMNS // pattern.m * (pattern.m - pattern.n)
    pruned = run(name, target_of(zeros, pattern), weight(), statistics())
    assert broken_groups(pruned.mask, pattern.n, pattern.m) == 0
    assert int((~pruned.mask).sum()) == zeros * ROWS
    assert pruned.mask.float().mean().item() == pytest.approx(pattern.n / pattern.m)


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_survivors_are_bit_identical(name: str) -> None:
    w = weight(torch.bfloat16)
    pruned = run(name, target_of(30), w, statistics())
    assert torch.equal(pruned.weight[pruned.mask], w[pruned.mask])


def test_magnitude_keeps_the_largest_of_its_scope() -> None:
    w = weight()
    matrix = run("magnitude", target_of(40), w, statistics())
    assert w[matrix.mask].abs().min() >= w[~matrix.mask].abs().max()
    rows = run("magnitude", target_of(40), w, statistics(), scope="row")
    assert torch.equal((~rows.mask).sum(dim=1), torch.full((ROWS,), 40))
    for row, mask in zip(w, rows.mask, strict=True):
        assert row[mask].abs().min() >= row[~mask].abs().max()


def test_wanda_prunes_every_row_alike_and_ignores_the_input_scale() -> None:
    x = torch.randn(4, 30, COLUMNS, generator=torch.Generator().manual_seed(9))
    masks = []
    for scale in (1.0, 64.0):
        stats = InputStatistics(COLUMNS, "sum_squares", x.device)
        stats.add(x * scale, 4)
        masks.append(run("wanda", target_of(30), weight(), stats).mask)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal((~masks[0]).sum(dim=1), torch.full((ROWS,), 30))


def test_wanda_on_equal_inputs_is_magnitude_by_row() -> None:
    stats = InputStatistics(COLUMNS, "sum_squares", torch.device("cpu"))
    stats.add(torch.ones(2, 5, COLUMNS), 2)
    assert torch.equal(
        run("wanda", target_of(21), weight(), stats).mask,
        run("magnitude", target_of(21), weight(), stats, scope="row").mask,
    )


def test_dead_inputs_go_first() -> None:
    stats = statistics(dead=(3, 17))
    for name in ("wanda", "sparsegpt"):
        pruned = run(name, target_of(8), weight(), stats)
        assert not pruned.mask[:, [3, 17]].any()
        assert not pruned.weight[:, [3, 17]].any()


def test_selection_equals_a_stable_sort_with_many_ties() -> None:
    scores = torch.randint(0, 4, (50, 37), generator=torch.Generator().manual_seed(0)).float()
    for k in (0, 1, 7, 20, 36, 37):
        mask = torch.ones_like(scores, dtype=torch.bool)
        mask.scatter_(1, scores.argsort(dim=1, stable=True)[:, :k], False)
        assert torch.equal(keep_all_but_smallest(scores, k), mask)


def test_n_of_m_breaks_ties_by_index() -> None:
    assert keep_n_of_m(torch.zeros(1, 4), 2, 4).tolist() == [[False, False, True, True]]
