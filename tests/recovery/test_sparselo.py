"""Sparse plus low rank."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch

from sparsedeploy.masks import apply_mask
from sparsedeploy.models.low_rank import LowRankLinear, attach_low_rank
from sparsedeploy.pruning.base import Pruned
from sparsedeploy.pruning.selection import keep_all_but_smallest
from sparsedeploy.recovery.sparselo import SparseLoOptions, refine_iteratively, sparselo, split_weight
from sparsedeploy.recovery.svd import low_rank_factors, top_singular
from tests.recovery.jobs import job, weights
from tests.small_models import random_model


def matrix(rows: int = 24, columns: int = 40, decay: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return values if decay == 0 else values * torch.arange(1, columns + 1, dtype=torch.float64) ** -decay


def pruned(weight: torch.Tensor, zeros: int = 20) -> Pruned:
    mask = keep_all_but_smallest(weight.abs(), zeros)
    return Pruned(mask, apply_mask(weight, mask))


def residual(weight: torch.Tensor, options: SparseLoOptions) -> float:
    return split_weight(weight, pruned(weight), options).residual


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_randomised_svd_finds_the_leading_triplets(rank: int) -> None:
    """A spectrum that decays, as weights' do; compared with the full decomposition."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(150, 120, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(130, 120, generator=generator, dtype=torch.float64)).Q
    values = torch.arange(1, 121, dtype=torch.float64) ** -0.7
    full = (u * values) @ v.T
    u_r, s, vh = top_singular(full, rank, method="randomized")
    torch.testing.assert_close(s, values[:rank], rtol=1e-5, atol=0)
    best = (u[:, :rank] * values[:rank]) @ v[:, :rank].T
    error = torch.linalg.matrix_norm(full - (u_r * s) @ vh)
    assert error <= torch.linalg.matrix_norm(full - best) * (1 + 1e-6)
    again = top_singular(full, rank, method="randomized")
    assert torch.equal(again[1], s), "seeded"


def test_rank_is_capped_at_the_smaller_side() -> None:
    a, b = low_rank_factors(matrix(6, 9), 100)
    assert a.shape == (6, 9)
    assert b.shape == (6, 6)
    torch.testing.assert_close(b @ a, matrix(6, 9).to(b.dtype))


@pytest.mark.parametrize("refine", ["none", "iterative", "pcp"])
def test_zeros_of_s_hold_and_the_residual_is_eckart_youngs(refine: Any) -> None:
    weight = matrix()
    choice = pruned(weight)
    split = split_weight(weight, choice, SparseLoOptions(rank=4, refine=refine, iterations=20))
    assert not split.sparse[~choice.mask].any()
    assert torch.equal(split.mask, choice.mask)
    rest = weight - split.sparse
    singular = torch.linalg.svdvals(rest)
    left = (rest - split.factors.b @ split.factors.a).square().sum()
    torch.testing.assert_close(left, singular[4:].square().sum())
    assert left <= rest.square().sum()
    assert split.residual == pytest.approx((left / weight.square().sum()).sqrt().item())


def test_full_rank_reconstructs_the_weight() -> None:
    assert residual(matrix(), SparseLoOptions(rank=24)) < 1e-12


def test_iterative_residual_never_rises_at_fixed_rank() -> None:
    weight = matrix(decay=0.3)
    choice = pruned(weight)
    options = SparseLoOptions(rank=4, refine="iterative", rank_schedule="fixed", svd="full")
    history = []
    sparse = choice.weight
    for _ in range(12):
        history.append(torch.linalg.svdvals(weight - sparse)[4:].square().sum().item())
        sparse = refine_iteratively(weight, sparse, choice.mask, dataclasses.replace(options, iterations=1))
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(history))
    assert history[-1] < 0.9 * history[0]


@pytest.mark.parametrize("refine", ["iterative", "pcp"])
@pytest.mark.parametrize("schedule", ["fixed", "linear"])
@pytest.mark.parametrize("norm", ["induced", "entrywise"])
def test_refinement_never_makes_it_worse(refine: Any, schedule: Any, norm: Any) -> None:
    """The entrywise norm does make the nuclear part worse; then the base solution is kept."""
    weight = matrix(seed=3)
    base = residual(weight, SparseLoOptions(rank=4))
    options = SparseLoOptions(rank=4, refine=refine, rank_schedule=schedule, pcp_norm=norm, iterations=10)
    assert residual(weight, options) <= base * (1 + 1e-9)


def test_pruned_only_loses_more_than_base_and_base_more_than_iterative() -> None:
    weight = matrix(64, 48, decay=0.2, seed=1)
    choice = pruned(weight, 24)
    nothing = (torch.linalg.matrix_norm(weight - choice.weight) / torch.linalg.matrix_norm(weight)).item()
    base = split_weight(weight, choice, SparseLoOptions(rank=8)).residual
    iterative = split_weight(weight, choice, SparseLoOptions(rank=8, refine="iterative", iterations=10)).residual
    assert nothing > base > iterative


@pytest.mark.parametrize("variant", ["pruner", "wanda", "random"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_variants_keep_the_planned_zeros_and_restore_plain_linears(variant: Any, pattern: str) -> None:
    work = job(sparsity=0.5, pattern=pattern, pruner="sparsegpt" if variant == "pruner" else "wanda")
    dense = weights(work.model)
    result = sparselo(work, SparseLoOptions(variant=variant, rank=4))
    assert not any(isinstance(m, LowRankLinear) for m in work.model.modules())
    for name, linear in work.linears.items():
        mask = result.masks[name]
        assert int((~mask).sum()) == result.plan.by_name[name].zeros
        assert not linear.weight[~mask].any()
        if variant != "pruner":
            assert torch.equal(linear.weight[mask], dense[f"{name}.weight"][mask]), "survivors as they were"
    kept = sum(int(m.sum()) for m in result.masks.values())
    factors = sum(4 * sum(m.shape) for m in result.masks.values())
    total = sum(m.numel() for m in result.masks.values())
    assert result.report["effective_density"] == pytest.approx((kept + factors) / total)


def test_random_masks_differ_from_module_to_module_and_are_seeded() -> None:
    first = sparselo(job(sparsity=0.5), SparseLoOptions(variant="random", rank=2)).masks
    again = sparselo(job(sparsity=0.5), SparseLoOptions(variant="random", rank=2)).masks
    assert all(torch.equal(first[name], again[name]) for name in first)
    q = [mask for name, mask in first.items() if name.endswith("q_proj")]
    assert not torch.equal(q[0], q[1])


def test_lowrank_only_at_full_rank_is_the_dense_model() -> None:
    model = random_model("opt")
    tokens = torch.randint(0, 250, (2, 16))
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        work = job(model)
        result = sparselo(work, SparseLoOptions(variant="lowrank-only", rank=10_000))
        assert all(not linear.weight.any() for linear in work.linears.values())
        attach_low_rank(model, result.low_rank)
        torch.testing.assert_close(model(input_ids=tokens).logits, before, rtol=1e-4, atol=1e-5)


def test_the_low_rank_part_brings_the_logits_closer() -> None:
    model = random_model("llama")
    tokens = torch.randint(0, 250, (2, 16))
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits
        pruned_logits = []
        for rank in (2, 8, 32):
            work = job(copy.deepcopy(model), sparsity=0.7)
            attach_low_rank(work.model, sparselo(work, SparseLoOptions(rank=rank)).low_rank)
            pruned_logits.append((work.model(input_ids=tokens).logits - wanted).norm().item())
    assert pruned_logits[0] > pruned_logits[1] > pruned_logits[2]


def test_attaching_before_or_after_changes_what_later_layers_see() -> None:
    results = {
        attach: sparselo(job(sparsity=0.7), SparseLoOptions(rank=16, attach=attach))  # type: ignore[arg-type]
        for attach in ("before", "after")
    }
    first = [name for name in results["before"].masks if ".layers.0." in name]
    assert all(torch.equal(results["before"].masks[n], results["after"].masks[n]) for n in first[:3])
    last = [name for name in results["before"].masks if ".layers.3." in name]
    assert any(not torch.equal(results["before"].masks[n], results["after"].masks[n]) for n in last)
