"""LSA: units whose weights are costly to drop jointly are pruned more; layer, block or projection.

*Layer-wise Sparsity Allocation for Large Language Model Pruning Based on Minimal Linear Reconstruction Error*, ICLR
2026: E = sum over rows of w_i w_j H_ij over the dropped columns i, j; I = 1 - E / sum E.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch

from sparsedeploy.allocation.base import Allocation, Unit, centred_range, layer_units, tabulated_strength
from sparsedeploy.calibration.driver import LayerContext
from sparsedeploy.options import Options, option
from sparsedeploy.plan import ModuleShape
from sparsedeploy.registry import ALLOCATORS

_FINE_STRENGTH = 0.07
_ROWS_AT_ONCE = 512  # a group of so many rows stays in a core's cache through its greedy steps


@dataclass(frozen=True)
class LSAOptions(Options):
    """What LSA scores, and how far it spreads the rates."""

    granularity: Literal["layer", "block", "projection"] = option(
        "layer",
        "One score per `layer`, per `block` (attention, MLP) or per `projection`. The released code's block mode "
        "equals its projection mode, because it tests for an old name of the option.",
    )
    strength: float | None = option(
        None,
        "beta. None takes the published table at layer granularity (0.15 at 70 %) and 0.07 at the others.",
        at_least=0,
    )
    removed: float = option(
        0.5,
        "Fraction of the weights that the scoring drops (p); it prunes nothing.",
        above=0,
        below=1,
    )
    group: int = option(
        128,
        "Columns per step of the greedy choice (B); 0 takes a whole row, the released default.",
        at_least=0,
    )
    reference_tail: bool = option(
        False,
        "From a last group that is shorter than the others, drop as many weights as from a whole one, up to all of "
        "them, as the released code does (which fails where the group has fewer).",
    )
    block_unit: bool = option(
        False,
        "At block granularity, one rate per block with the block's size. Otherwise each projection's deviation is "
        "scaled by its own size, as in the released code, so that members of a block differ.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_unit and self.granularity != "block":
            raise ValueError("block_unit belongs to granularity=block")


@ALLOCATORS.register("lsa", LSAOptions, needs="hessian", strength="strength")
class LSA:
    """Layerwise sparsity from minimal linear reconstruction errors: I = 1 - E / sum E; larger E, more sparsity."""

    def __init__(self, options: LSAOptions) -> None:
        self.options = options

    def measure(self, layer: LayerContext) -> list[float]:
        """E of every linear of the layer, in order; linears that share an input go through the greedy together."""
        sharing: dict[int, list[str]] = {}
        for name in layer.linears:
            sharing.setdefault(id(layer.statistics[name]), []).append(name)
        errors: dict[str, float] = {}
        for names in sharing.values():
            weights = [layer.linears[name].weight.detach().float() for name in names]
            per_row, _ = greedy_removal(
                torch.cat(weights),
                layer.statistics[names[0]].hessian,
                removed=self.options.removed,
                group=self.options.group,
                reference_tail=self.options.reference_tail,
            )
            for name, rows in zip(names, per_row.split([len(weight) for weight in weights]), strict=True):
                errors[name] = rows.sum().item()
        return [errors[name] for name in layer.linears]

    def allocate(self, measured: list[list[float]], layers: list[list[ModuleShape]], sparsity: float) -> Allocation:
        details = {"error": measured}
        # I = 1 - E / sum E falls linearly with E, and the range is normalised next: -E gives the same densities.
        if self.options.granularity == "layer":
            strength = tabulated_strength(sparsity) if self.options.strength is None else self.options.strength
            density = centred_range([-math.fsum(errors) / len(errors) for errors in measured], strength)
            return Allocation(layer_units(layers, [-d for d in density]), details=details)
        strength = _FINE_STRENGTH if self.options.strength is None else self.options.strength
        groups: list[list[tuple[ModuleShape, float]]] = []
        for layer, errors in zip(layers, measured, strict=True):
            pairs = list(zip(layer, errors, strict=True))
            groups += [[pair] for pair in pairs] if self.options.granularity == "projection" else blocks(pairs)
        means = [math.fsum(error for _, error in group) / len(group) for group in groups]
        if not self.options.block_unit:
            means = [mean for mean, group in zip(means, groups, strict=True) for _ in group]
            groups = [[pair] for group in groups for pair in group]
        density = centred_range([-mean for mean in means], strength)
        sizes = [sum(module.size for module, _ in group) for group in groups]
        mean_size = sum(sizes) / len(sizes)
        units = tuple(
            Unit(tuple(module.name for module, _ in group), -d * mean_size / size)
            for group, d, size in zip(groups, density, sizes, strict=True)
        )
        return Allocation(units, details=details, ranking=tuple(density))


def blocks(pairs: list[tuple[ModuleShape, float]]) -> list[list[tuple[ModuleShape, float]]]:
    """A layer's linears by the module that holds them: attention and MLP, whatever their names and number."""
    return [list(group) for _, group in groupby(pairs, key=lambda pair: pair[0].name.rpartition(".")[0])]


def greedy_removal(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    removed: float = 0.5,
    group: int = 128,
    reference_tail: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop a share of every row greedily and say what output error that makes.

    E_k = sum over i, j dropped of w_ki w_kj H_ij = |dropped part of row k times X^T|^2 when H = X^T X. In column
    groups from left to right, every row drops again and again the weight that adds least, given what it has dropped.

    Args:
        weight: ``[rows, columns]``; its type is the type of the arithmetic.
        hessian: ``[columns, columns]``, symmetric, any positive scale.
        removed: share of each group that goes, rounded down (of a short last group too).
        group: columns per group; 0 for all.
        reference_tail: of a short last group as many go as of a whole one, up to all.

    Returns:
        The error of each row, float64 ``[rows]``, and what was dropped, bool ``[rows, columns]``. NaN errors where the
        input overflows.
    """
    width = group or weight.shape[1]
    hessian = hessian.to(weight)
    if weight.is_cuda:
        return _greedy_rows(weight, hessian, removed, width, reference_tail)
    # Rows are independent, and the steps are too short to share one among threads: each thread takes its own rows.
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            parts = list(
                pool.map(
                    lambda rows: _greedy_rows(rows, hessian, removed, width, reference_tail),
                    weight.detach().split(_ROWS_AT_ONCE),
                )
            )
    finally:
        torch.set_num_threads(threads)
    return torch.cat([errors for errors, _ in parts]), torch.cat([dropped for _, dropped in parts])


def _greedy_rows(
    weight: torch.Tensor, hessian: torch.Tensor, share: float, width: int, reference_tail: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    cost = weight.square() * hessian.diagonal()  # what dropping each weight would add to its row's error
    errors = torch.zeros(rows, dtype=torch.float64, device=weight.device)
    dropped = torch.zeros(rows, columns, dtype=torch.bool, device=weight.device)
    if not torch.isfinite(cost).all():
        return errors.fill_(math.nan), dropped
    for start in range(0, columns, width):
        end = min(start + width, columns)
        w = weight[:, start:end].contiguous()
        twice = 2 * w
        h = hessian[start:end, start:end].contiguous()
        inner = cost[:, start:end].contiguous()
        # argmin and comparisons are slow on a CPU: 0 where the minimum is and 1 elsewhere, times the width, plus the
        # index, is smallest at the minimum's first place.
        index = torch.arange(end - start, dtype=weight.dtype, device=weight.device)
        key = torch.empty_like(inner)
        whole = width if reference_tail else end - start
        for _ in range(min(math.floor(whole * share + 1e-9), end - start)):
            lowest = inner.amin(dim=1, keepdim=True)
            torch.sub(inner, lowest, out=key).sign_()
            at = torch.add(index, key, alpha=end - start, out=key).amin(dim=1, keepdim=True).long()
            errors += lowest[:, 0]
            inner.addcmul_(h.index_select(0, at[:, 0]).mul_(twice), w.gather(1, at))
            inner.scatter_(1, at, math.inf)
        gone = inner == math.inf
        dropped[:, start:end] = gone
        if end < columns:
            cross = torch.where(gone, w, 0) @ hessian[start:end, end:]
            cost[:, end:].addcmul_(cross, weight[:, end:], value=2)
    return errors, dropped
