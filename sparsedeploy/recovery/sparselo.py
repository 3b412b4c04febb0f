"""SparseLo: W ~ S + B A, a sparse matrix plus a low-rank one that makes up for what was pruned.

After LoSparse: Li et al., ICML 2023, arXiv 2306.11222.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.allocation.allocate import allocate, model_layers
from sparsedeploy.calibration.driver import LayerDriver, iterate_weights
from sparsedeploy.calibration.statistics import InputStatistics
from sparsedeploy.masks import apply_mask
from sparsedeploy.models.low_rank import LowRank, LowRankLinear
from sparsedeploy.models.structure import plain_linears
from sparsedeploy.options import Options, option
from sparsedeploy.plan import ModuleTarget, SparsityPlan
from sparsedeploy.pruning.base import Pruned
from sparsedeploy.pruning.selection import keep_by_target
from sparsedeploy.pruning.wanda import WandaOptions
from sparsedeploy.recovery.base import Recovered, RecoveryJob
from sparsedeploy.recovery.svd import SVDMethod, low_rank_factors, top_singular
from sparsedeploy.registry import ALLOCATORS, PRUNERS, RECOVERIES

_NOTHING_LEFT = 0.01  # of |W - S|: a tail this small is not worth another step
_PCP_RATE, _PCP_LAST_RATE = 1e-2, 1e-3


@dataclass(frozen=True)
class SparseLoOptions(Options):
    """What is kept sparse, and how its low-rank complement is found."""

    variant: Literal["pruner", "wanda", "random", "lowrank-only"] = option(
        "pruner",
        "What chooses S: `pruner`, the method that `prune` was given (the released magnitude variant is magnitude with "
        "scope=row), `wanda`, or `random`; `lowrank-only` keeps no sparse part.",
    )
    rank: int = option(128, "Rank of B A, capped by each matrix's smaller side.", at_least=1)
    refine: Literal["none", "iterative", "pcp"] = option(
        "none",
        "`iterative` moves the tail of W - S into S on its support; `pcp` learns S so that W - S has a small nuclear "
        "norm; the result is kept only where the rank-r residual falls.",
    )
    iterations: int = option(50, "Iterations of the refinement.", at_least=1)
    rank_schedule: Literal["linear", "fixed"] = option(
        "fixed",
        "Iterative refinement's rank rises to `rank` (`linear`, the released code) or is `rank` throughout.",
    )
    pcp_norm: Literal["induced", "entrywise"] = option(
        "induced", "Norm of S: the induced 1-norm of the released code, or the entrywise one of its documentation."
    )
    attach: Literal["before", "after"] = option(
        "before",
        "Later layers see the low-rank part (`before`), or only S, as in the released base variant (`after`).",
    )
    svd: SVDMethod = option("auto", "Full or randomised (seeded) decomposition; `auto` decides by size.")


@dataclass(frozen=True)
class Split:
    """S and B A of one weight.

    Attributes:
        sparse: ``[rows, columns]``, zero outside ``mask``.
        residual: |W - S - B A| / |W| in Frobenius norms.
    """

    sparse: torch.Tensor
    mask: torch.Tensor
    factors: LowRank
    residual: float


@RECOVERIES.register("sparselo", SparseLoOptions, starts_from="dense", trains=False, calibrates=True, merged=False)
def sparselo(job: RecoveryJob, options: SparseLoOptions) -> Recovered:
    """Sparse plus low rank: what pruning removes is kept as a product of two thin matrices, without training."""
    plan = _plan(job, options)
    targets = plan.by_name
    masks: dict[str, torch.Tensor] = {}
    low_rank: dict[str, LowRank] = {}
    residuals: dict[str, float] = {}
    replaced: dict[str, LowRankLinear] = {}
    needs = _needs(job, options)
    walk = (
        iterate_weights(job.model)
        if needs == "none"
        else LayerDriver(
            job.model, job.calibration_tokens(), batch_size=job.batch_size, accumulate=job.accumulate
        ).iterate(needs, changes_weights=True)
    )
    with (
        torch.no_grad(),
        _restored(job.model, replaced),
        progress.bar("sparselo", len(model_layers(job.model)), "layers") as advance,
    ):
        for layer in walk:
            for name, linear in plain_linears(layer.linears, "sparselo").items():
                pruned = _choose(job, options, linear.weight.data, layer.statistics.get(name), targets[name])
                split = split_weight(linear.weight.data, pruned, options, seed=job.seed)
                linear.weight.data.copy_(split.sparse)
                masks[name], residuals[name] = split.mask.cpu(), split.residual
                low_rank[name] = split.factors
                if options.attach == "before":
                    replaced[name] = LowRankLinear(linear, split.factors)
                    _replace(job.model, name, replaced[name])
            advance()
    density = effective_density(masks, low_rank)
    progress.note(f"effective density {density:.2%}: nonzeros of S and both factors, over the dense weights")
    return Recovered(
        plan,
        masks,
        {},
        {
            "effective_density": density,
            "residual": residuals,
            "rank": {name: len(factors.a) for name, factors in low_rank.items()},
        },
        low_rank,
    )


def split_weight(weight: torch.Tensor, pruned: Pruned, options: SparseLoOptions, *, seed: int = 0) -> Split:
    """S and the rank-r factors of W - S, refined when asked; factors in the weight's type, residuals in float32."""
    reference = weight if weight.dtype == torch.float64 else weight.float()
    sparse = apply_mask(pruned.weight.to(reference.dtype), pruned.mask)
    if options.refine != "none" and bool(pruned.mask.any()):
        refined = (
            refine_iteratively(reference, sparse, pruned.mask, options, seed=seed)
            if options.refine == "iterative"
            else refine_by_pcp(reference, sparse, pruned.mask, options)
        )
        if _tail(reference - refined, options, seed) < _tail(reference - sparse, options, seed):
            sparse = refined
    sparse = apply_mask(sparse.to(weight.dtype), pruned.mask)
    a, b = low_rank_factors(reference - sparse.to(reference.dtype), options.rank, method=options.svd, seed=seed)
    factors = LowRank(a.to(weight.dtype), b.to(weight.dtype))
    rest = reference - sparse.to(reference.dtype) - factors.b.to(reference.dtype) @ factors.a.to(reference.dtype)
    norm = torch.linalg.matrix_norm(reference).item()
    return Split(sparse, pruned.mask, factors, torch.linalg.matrix_norm(rest).item() / norm if norm > 0 else 0.0)


def refine_iteratively(
    reference: torch.Tensor, sparse: torch.Tensor, mask: torch.Tensor, options: SparseLoOptions, *, seed: int = 0
) -> torch.Tensor:
    """Alternate: the part of W - S beyond rank rho goes into S on its support.

    At fixed rank the residual never rises. Only the leading part is decomposed: the tail is the rest.
    """
    rank = min(options.rank, min(reference.shape) - 1)
    if rank < 1:
        return sparse
    for step in range(options.iterations):
        share = step / (options.iterations - 1) if options.iterations > 1 else 1.0
        rho = rank if options.rank_schedule == "fixed" else int(1 + (rank - 1) * share)
        rest = reference - sparse
        u, s, vh = top_singular(rest, rho, method=options.svd, seed=seed + step)
        tail = rest - (u * s) @ vh
        sparse = sparse + mask * tail
        if torch.linalg.matrix_norm(tail) <= _NOTHING_LEFT * torch.linalg.matrix_norm(rest):
            break
    return sparse


def refine_by_pcp(
    reference: torch.Tensor, sparse: torch.Tensor, mask: torch.Tensor, options: SparseLoOptions
) -> torch.Tensor:
    """Learn S on its support: least nuclear norm of W - S plus lambda times a norm of S.

    lambda = 1 / sqrt(max(rows, columns)); AdamW, rate 1e-2 falling to 1e-3 by a cosine.
    """
    weight = 1 / max(reference.shape) ** 0.5
    moved = torch.zeros_like(reference, requires_grad=True)
    optimizer = torch.optim.AdamW([moved], lr=_PCP_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.iterations, eta_min=_PCP_LAST_RATE)
    with torch.enable_grad():
        for _ in range(options.iterations):
            part = sparse - moved * mask
            norm = torch.linalg.matrix_norm(part, 1) if options.pcp_norm == "induced" else part.abs().sum()
            loss = torch.linalg.matrix_norm(reference - part, "nuc") + weight * norm
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return (sparse - moved * mask).detach()


def effective_density(masks: dict[str, torch.Tensor], low_rank: dict[str, LowRank]) -> float:
    """Nonzeros of S plus all of A and B, over the dense weights: the only fair size to compare by."""
    kept = sum(int(mask.sum()) for mask in masks.values()) + sum(factors.size for factors in low_rank.values())
    return kept / sum(mask.numel() for mask in masks.values())


def _tail(rest: torch.Tensor, options: SparseLoOptions, seed: int) -> float:
    """Squared Frobenius norm of what rank r leaves of a matrix."""
    s = top_singular(rest, options.rank, method=options.svd, seed=seed)[1]
    return rest.double().square().sum().item() - s.double().square().sum().item()


def _plan(job: RecoveryJob, options: SparseLoOptions) -> SparsityPlan:
    """The targets of the variant; lowrank-only has its own."""
    if options.variant == "lowrank-only":
        modules = [module for layer in model_layers(job.model) for module in layer]
        targets = tuple(ModuleTarget(m.name, m.rows, m.columns, m.columns) for m in modules)
        return SparsityPlan(1.0, "unstructured", "uniform", targets, model_sha256=job.model_sha256)
    if job.plan is not None:
        return job.plan
    name = job.allocation or "uniform"
    return allocate(
        job.model,
        job.calibration.tokens if job.calibration else None,
        job.sparsity,
        job.pattern,
        name,
        job.allocation_options if job.allocation else ALLOCATORS.get(name).make_options(),
        mixed=job.mixed,
        model_sha256=job.model_sha256,
        batch_size=job.batch_size,
        accumulate=job.accumulate,
    )


def _needs(job: RecoveryJob, options: SparseLoOptions) -> Literal["none", "sum_squares", "hessian"]:
    if options.variant == "pruner":
        return PRUNERS.get(job.pruner).traits["needs"]
    return "sum_squares" if options.variant == "wanda" else "none"


def _choose(
    job: RecoveryJob,
    options: SparseLoOptions,
    weight: torch.Tensor,
    statistics: InputStatistics | None,
    target: ModuleTarget,
) -> Pruned:
    """What the variant keeps of one weight."""
    if options.variant == "pruner":
        return PRUNERS.get(job.pruner).function(weight, statistics, target, job.pruner_options)
    if options.variant == "wanda":
        return PRUNERS.get("wanda").function(weight, statistics, target, WandaOptions())
    if options.variant == "random":
        generator = torch.Generator().manual_seed(_seed_of(target.name, job.seed))
        scores = torch.rand(weight.shape, generator=generator).to(weight.device)
    else:
        scores = torch.zeros(weight.shape, device=weight.device)
    mask = keep_by_target(scores, target)
    return Pruned(mask, apply_mask(weight, mask))


def _seed_of(name: str, seed: int) -> int:
    """A seed per module, the same whatever the order of modules."""
    return int.from_bytes(hashlib.sha256(f"{name}:{seed}".encode()).digest()[:7], "big")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextmanager
def _restored(model: nn.Module, replaced: dict[str, LowRankLinear]) -> Iterator[None]:
    """Afterwards the model has plain linears with S again; the factors are the caller's to attach."""
    plain = dict(model.named_modules())
    try:
        yield
    finally:
        for name in replaced:
            _replace(model, name, plain[name])
