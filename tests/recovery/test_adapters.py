"""Masked adapters: gradients, merging, growth."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsedeploy.masks import pack_bits, unpack_bits
from sparsedeploy.recovery.adapters import Adapter, attached, masked_product, merged, unmerged
from tests.small_models import random_model


def linear_and_mask(
    rows: int = 12, columns: int = 19, dtype: torch.dtype = torch.float64
) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, bias=False, dtype=dtype)
    mask = torch.rand(rows, columns) > 0.6
    linear.weight.data *= mask
    return linear, mask


def trained(adapter: Adapter, seed: int = 1) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    adapter.b.data.copy_(torch.randn(adapter.b.shape, generator=generator))
    return adapter


@pytest.mark.parametrize("columns", [1, 7, 8, 19, 64])
def test_packing_keeps_every_bit(columns: int) -> None:
    mask = torch.rand(5, columns) > 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, -(-columns // 8))
    assert torch.equal(unpack_bits(packed, columns), mask)


def test_gradients_are_autograds_in_float64() -> None:
    linear, mask = linear_and_mask()
    adapter = trained(Adapter(linear, 3, mask, dropout=0.0))
    x = torch.randn(2, 5, 19, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, 12, dtype=torch.float64)
    (adapter(x) * weights).sum().backward()
    a, b, free = (t.detach().clone().requires_grad_() for t in (adapter.a, adapter.b, x))
    ((free @ (adapter.scale * (b @ a) * mask).T) * weights).sum().backward()
    torch.testing.assert_close(adapter.a.grad, a.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapter.b.grad, b.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, free.grad, rtol=1e-12, atol=1e-12)


def test_gradcheck_by_finite_differences() -> None:
    from sparsedeploy.recovery.adapters import _MaskedLowRank

    linear, mask = linear_and_mask(4, 6)
    adapter = trained(Adapter(linear, 2, mask))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert adapter.packed is not None
    packed = adapter.packed
    for weight in (None, linear.weight.detach()):
        assert torch.autograd.gradcheck(
            lambda x, a, b, weight=weight: _MaskedLowRank.apply(x, weight, a, b, packed, 2.0), (x, adapter.a, adapter.b)
        )


@pytest.mark.parametrize("bias", [False, True])
def test_one_product_with_the_sum_is_two_products(bias: bool) -> None:
    """Without dropout the linear and the delta are multiplied at once; with it, or under autocast, one by one."""
    linear, mask = linear_and_mask()
    linear.bias = nn.Parameter(torch.randn(12, dtype=torch.float64)) if bias else None
    adapter = trained(Adapter(linear, 3, mask, dropout=0.0))
    x = torch.randn(2, 5, 19, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, 12, dtype=torch.float64)
    found = []
    for compute in (lambda: adapter.beside(linear, x), lambda: linear(x) + adapter(x)):
        output = compute()
        found.append([output, *torch.autograd.grad((output * weights).sum(), (x, adapter.a, adapter.b))])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_gradients_follow_the_formulas() -> None:
    """dB = scale (G o M) A^T and dA = scale B^T (G o M), G = (dL/dy)^T x."""
    linear, mask = linear_and_mask()
    adapter = trained(Adapter(linear, 3, mask, dropout=0.0))
    x = torch.randn(7, 19, dtype=torch.float64)
    weights = torch.randn(7, 12, dtype=torch.float64)
    (adapter(x) * weights).sum().backward()
    g = (weights.T @ x) * mask
    torch.testing.assert_close(adapter.b.grad, adapter.scale * g @ adapter.a.data.T)
    torch.testing.assert_close(adapter.a.grad, adapter.scale * adapter.b.data.T @ g)


def test_only_inputs_factors_and_packed_mask_are_saved() -> None:
    linear, mask = linear_and_mask(64, 64, torch.float32)
    adapter = trained(Adapter(linear, 2, mask, dropout=0.0))
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        adapter(x)
    assert {tuple(t.shape) for t in saved} == {(3, 64), (2, 64), (64, 2), (64, 8)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_keeps_zeros_and_the_forward_pass(dtype: torch.dtype) -> None:
    linear, mask = linear_and_mask(dtype=torch.float32)
    linear = linear.to(dtype)
    adapter = trained(Adapter(linear, 3, mask))
    assert adapter.a.dtype == torch.float32
    weight = merged(linear.weight.data, adapter, mask)
    assert weight.dtype == dtype
    assert not weight[~mask].any()
    assert not torch.signbit(weight[~mask]).any()
    adapter.eval()
    x = torch.randn(4, 19)
    unmerged_output = linear.weight.data.float() @ x.T + adapter(x).T
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(weight.float() @ x.T, unmerged_output.detach(), rtol=tolerance, atol=tolerance)


def test_unmerging_under_a_smaller_mask_keeps_its_zeros() -> None:
    linear, mask = linear_and_mask(dtype=torch.float32)
    linear = linear.to(torch.bfloat16)
    adapter = trained(Adapter(linear, 3, mask))
    weight = merged(linear.weight.data, adapter, mask)
    smaller = mask & (torch.rand(mask.shape) > 0.3)
    adapter.set_mask(smaller)
    base = unmerged(weight * smaller, adapter, smaller)
    assert not base[~smaller].any()
    again = merged(base, adapter, smaller)
    torch.testing.assert_close(again.float(), (weight * smaller).float(), rtol=0.02, atol=0.02)


def test_a_full_mask_is_plain_lora() -> None:
    linear, mask = linear_and_mask()
    with_mask = trained(
        Adapter(linear, 3, torch.ones_like(mask), dropout=0.0, generator=torch.Generator().manual_seed(5))
    )
    without = trained(Adapter(linear, 3, None, dropout=0.0, generator=torch.Generator().manual_seed(5)))
    x = torch.randn(4, 19, dtype=torch.float64)
    torch.testing.assert_close(with_mask(x), without(x))
    for adapter in (with_mask, without):
        adapter(x).square().sum().backward()
    torch.testing.assert_close(with_mask.a.grad, without.a.grad)
    torch.testing.assert_close(with_mask.b.grad, without.b.grad)


def test_a_new_adapter_changes_nothing_and_detaches_cleanly() -> None:
    model = random_model("opt")
    from sparsedeploy.models.structure import find_decoder_stack

    linears = find_decoder_stack(model).all_linears()
    tokens = torch.randint(0, 256, (2, 12))
    before = model(input_ids=tokens).logits
    names = set(dict(model.named_modules()))
    adapters = {name: Adapter(linear, 2, torch.rand_like(linear.weight) > 0.5) for name, linear in linears.items()}
    with torch.no_grad(), attached(linears, adapters):
        torch.testing.assert_close(model(input_ids=tokens).logits, before)
        trained(adapters[next(iter(adapters))])
        assert not torch.equal(model(input_ids=tokens).logits, before)
    assert torch.equal(model(input_ids=tokens).logits, before)
    assert set(dict(model.named_modules())) == names


def test_growth_by_reinit_leaves_the_output_and_shrinking_discards() -> None:
    linear, mask = linear_and_mask()
    adapter = trained(Adapter(linear, 3, mask, dropout=0.0))
    x = torch.randn(4, 19, dtype=torch.float64)
    before = adapter(x).detach()
    adapter.set_rank(6)
    assert adapter.rank == 6
    torch.testing.assert_close(adapter(x).detach(), before)
    assert adapter.a.data[3:].abs().sum() > 0, "new rows must be able to learn"
    adapter.b.data[:, 3:] = 1.0
    adapter.set_rank(3)
    torch.testing.assert_close(adapter(x).detach(), before)
    adapter.set_rank(6)
    torch.testing.assert_close(adapter(x).detach(), before)


def test_growth_by_retain_brings_back_what_was_dropped() -> None:
    linear, mask = linear_and_mask()
    adapter = trained(Adapter(linear, 5, mask, dropout=0.0))
    x = torch.randn(4, 19, dtype=torch.float64)
    before = adapter(x).detach()
    adapter.set_rank(2, regrow="retain")
    assert not torch.allclose(adapter(x).detach(), before)
    adapter.set_rank(4, regrow="retain")
    adapter.set_rank(5, regrow="retain")
    torch.testing.assert_close(adapter(x).detach(), before)


def test_state_round_trip_with_dropped_components() -> None:
    linear, mask = linear_and_mask()
    adapter = trained(Adapter(linear, 5, mask, dropout=0.0))
    adapter.set_rank(2, regrow="retain")
    other = Adapter(linear, 4, mask, dropout=0.0)
    other.load_tensors({key: value.clone() for key, value in adapter.state_dict().items()})
    for each in (adapter, other):
        each.set_rank(5, regrow="retain")
    assert torch.equal(adapter.delta(), other.delta())


def test_the_scale_does_not_depend_on_the_rank() -> None:
    linear, mask = linear_and_mask()
    for rank in (1, 8, 16):
        assert Adapter(linear, rank, mask, alpha=16).scale == 2.0


def test_trainable_parameters_are_rank_times_both_sides() -> None:
    linear, mask = linear_and_mask(12, 19)
    parameters = list(Adapter(linear, 4, mask).parameters())
    assert sum(p.numel() for p in parameters) == 4 * (12 + 19)


def test_the_product_is_masked_exactly_in_float32_under_autocast() -> None:
    linear, mask = linear_and_mask(dtype=torch.float32)
    adapter = trained(Adapter(linear, 3, mask))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = masked_product(adapter.a.data, adapter.b.data, adapter.packed, 2.0)
    assert product.dtype == torch.float32
    assert not product[~mask].any()
    torch.testing.assert_close(product, 2.0 * (adapter.b.data @ adapter.a.data) * mask)


@pytest.mark.parametrize("mask", [torch.ones(3, 4, dtype=torch.bool), torch.ones(12, 19)])
def test_a_mask_that_does_not_fit_is_refused(mask: torch.Tensor) -> None:
    linear, _ = linear_and_mask()
    with pytest.raises(ValueError, match="mask is"):
        Adapter(linear, 2, mask)
