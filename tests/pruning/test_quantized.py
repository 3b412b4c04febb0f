"""Rounding in the sweep: codes, scales, masks, and the error against rounding afterwards."""

from __future__ import annotations

import pytest
import torch

from sparsedeploy.calibration.statistics import InputStatistics
from sparsedeploy.errors import UserError
from sparsedeploy.formats import quantized
from sparsedeploy.grid import Grid, codes_of
from sparsedeploy.plan import NM, ModuleTarget
from sparsedeploy.pruning.base import Pruned
from sparsedeploy.pruning.layers import prune_linear
from sparsedeploy.pruning.rounding import adjusted
from sparsedeploy.pruning.sweep import hessian_factor, solve
from sparsedeploy.registry import PRUNERS

ROWS, COLUMNS = 48, 256
GRIDS = [Grid(8), Grid(4), Grid(4, 64), Grid(8, 128)]


def inputs(columns: int = COLUMNS, seed: int = 0) -> torch.Tensor:
    """Correlated inputs, float32 ``[512, columns]``."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    spectrum = (torch.arange(columns) + 1.0) ** -0.4
    return torch.randn(512, columns, generator=generator) * spectrum @ basis.T


def weight_of(columns: int = COLUMNS, seed: int = 1) -> torch.Tensor:
    return torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(seed))


def statistics_of(x: torch.Tensor) -> InputStatistics:
    found = InputStatistics(x.shape[1], "hessian", x.device)
    found.add(x[None], 1)
    return found


class Linear:
    """A linear as the loop hands it to a pruner."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.out_features, self.in_features = weight.shape


def pruned_by(method: str, grid: Grid | None, pattern: NM | None = None, *, reconstruct: bool = False):  # type: ignore[no-untyped-def]
    weight, x = weight_of(), inputs()
    target = ModuleTarget("layers.0.q", ROWS, COLUMNS, COLUMNS // 2, pattern)
    pruner = PRUNERS.get(method)
    options = pruner.make_options({})
    return prune_linear(pruner, Linear(weight), statistics_of(x), target, options, reconstruct, grid)  # type: ignore[arg-type]


def output_error(weight: torch.Tensor) -> float:
    return float(((weight - weight_of()) @ inputs().T).square().sum())


def rounded_to_nearest(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Each group's largest value at the end of the codes, as ggml rounds."""
    groups = weight.reshape(len(weight), -1, grid.group)
    extreme = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scale = (extreme / grid.ends[0]).half().float()
    scale = torch.where(scale == 0, 1, scale)
    return (grid.codes(groups, scale) * scale).reshape(weight.shape)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("pattern", [None, NM(2, 4)], ids=str)
def test_weights_are_codes_times_scales(method: str, grid: Grid, pattern: NM | None) -> None:
    pruned = pruned_by(method, grid, pattern)
    assert pruned.scales is not None
    assert pruned.scales.shape == (ROWS, grid.groups(COLUMNS))
    assert pruned.scales.dtype == torch.float16
    assert not pruned.weight[~pruned.mask].any()
    assert int((~pruned.mask).sum()) == ROWS * COLUMNS // 2
    if pattern is not None:
        assert bool((pruned.mask.reshape(-1, pattern.m).sum(dim=1) == pattern.n).all())
    for stored in (torch.float32, torch.bfloat16, torch.float16):
        codes = codes_of(pruned.weight.to(stored), pruned.scales, grid)
        packed = quantized.pack(codes, pruned.scales, grid.bits, grid.group)
        assert torch.equal(quantized.unpack(packed), pruned.weight), "the packed format holds exactly these weights"


@pytest.mark.parametrize("method", ["magnitude", "wanda", "alps"])
def test_the_mask_stays_the_methods_own(method: str) -> None:
    assert torch.equal(pruned_by(method, Grid(4)).mask, pruned_by(method, None).mask)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_rounding_in_the_sweep_loses_less_than_rounding_afterwards(method: str) -> None:
    plain = pruned_by(method, None)
    assert output_error(pruned_by(method, Grid(4)).weight) < output_error(rounded_to_nearest(plain.weight, Grid(4)))


def test_least_squares_weights_are_rounded_too() -> None:
    both = pruned_by("wanda", Grid(8), reconstruct=True)
    assert torch.equal(both.mask, pruned_by("wanda", None).mask)
    assert output_error(both.weight) < output_error(pruned_by("wanda", None).weight)


def test_the_loss_is_the_output_error() -> None:
    weight, x = weight_of().double(), inputs().double()
    hessian = 2 * x.T @ x
    factor, dead = hessian_factor(hessian, 0.01, "q")
    target = ModuleTarget("q", ROWS, COLUMNS, COLUMNS // 2)
    new, _, loss, _ = solve(weight, factor, dead, target, 64, grid=Grid(4))
    change = new - weight
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    assert loss == pytest.approx(float((change @ damped * change).sum()) / 2, rel=1e-9)


@pytest.mark.parametrize("bits", [8, 4])
def test_adjusting_never_raises_the_error(bits: int) -> None:
    weight, x, grid = weight_of().double(), inputs().double(), Grid(bits)
    hessian = 2 * x.T @ x + 0.1 * torch.eye(COLUMNS, dtype=torch.float64)
    factor, dead = hessian_factor(hessian, 1e-9, "q")
    new, mask, _, scales = solve(weight, factor, dead, ModuleTarget("q", ROWS, COLUMNS, COLUMNS // 2), 64, grid=grid)

    def error(found: torch.Tensor) -> float:
        return float(((found - weight) @ hessian * (found - weight)).sum()) / 2

    errors = [error(new)]
    for passes in (1, 2, 3, 8):
        better = adjusted(Pruned(mask, new, None, scales), weight, hessian, grid, passes)
        assert better.scales is not None
        assert better.loss == pytest.approx(error(better.weight), rel=1e-6)
        codes = codes_of(better.weight, better.scales, grid)
        spread = better.scales.double().repeat_interleave(grid.group, dim=1)
        assert torch.equal(codes * spread, better.weight)
        assert not better.weight[~mask].any()
        errors.append(error(better.weight))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("bits", [8, 4])
def test_chosen_scales_beat_the_largest_value(bits: int) -> None:
    grid = Grid(bits)
    values = torch.randn(32, 500, generator=torch.Generator().manual_seed(0))
    kept = (torch.rand(32, 500, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    importance = torch.rand(32, generator=torch.Generator().manual_seed(2)) + 0.1

    def error(scale: torch.Tensor) -> torch.Tensor:
        rounded = grid.codes(values * kept, scale) * scale
        return ((rounded - values * kept).square() * importance[:, None]).sum(dim=0)

    chosen = grid.choose_scales(values, kept, importance)
    assert torch.equal(chosen, chosen.half().float())
    largest = (values * kept).abs().amax(dim=0) / grid.ends[1]
    largest = torch.where(largest == 0, 1, largest.half().float())
    assert bool((error(chosen) <= error(largest) + 1e-12).all())
    if bits == 4:  # with 8 bits, cutting values off hardly ever pays
        assert float(error(chosen).sum()) < 0.9 * float(error(largest).sum())


def test_a_group_without_values_has_a_scale_that_is_not_zero() -> None:
    empty = torch.zeros(32, 3)
    assert Grid(4).choose_scales(empty, empty, torch.ones(32)).tolist() == [1, 1, 1]


def test_a_block_may_not_cut_a_group() -> None:
    factor, dead = hessian_factor(torch.eye(64), 0.01, "q")
    with pytest.raises(UserError, match="64 columns is not divisible by 128"):
        solve(torch.randn(4, 64), factor, dead, ModuleTarget("q", 4, 64, 32), 64, grid=Grid(8, 128))
