"""Packed formats: exact round trips, sizes, cutting and joining, and damaged tensors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedeploy.errors import UserError
from sparsedeploy.formats import bitmask, bits, nm, packed
from sparsedeploy.formats.bitmask import BitmaskWeight
from sparsedeploy.formats.nm import NMWeight
from sparsedeploy.plan import NM

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PATTERNS = [NM(n, m) for m in (4, 8) for n in range(1, m + 1)]


def sparse_weight(rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    keep = torch.rand(rows, columns, generator=generator) >= sparsity
    return torch.where(keep, weight, 0.0).to(dtype)


def nm_weight(rows: int, columns: int, pattern: NM, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(rows, columns // pattern.m, pattern.m, generator=generator)
    keep = torch.rand(groups.shape, generator=generator).argsort(dim=2) < pattern.n
    return torch.where(keep, groups, 0.0).reshape(rows, columns).to(dtype)


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(bits.as_integers(first), bits.as_integers(second))


@given(
    rows=st.integers(0, 20),
    columns=st.integers(1, 70),
    sparsity=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_bitmask_round_trip(rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int) -> None:
    weight = sparse_weight(rows, columns, sparsity, dtype, seed)
    result = bitmask.pack(weight)
    bitmask.check(result)
    assert result.count == int((weight != 0).sum())
    assert same_bits(bitmask.unpack(result), weight)


@given(
    rows=st.integers(0, 12),
    groups=st.integers(1, 9),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_nm_round_trip(rows: int, groups: int, pattern: NM, dtype: torch.dtype, seed: int) -> None:
    weight = nm_weight(rows, groups * pattern.m, pattern, dtype, seed)
    result = nm.pack(weight, pattern)
    nm.check(result)
    assert same_bits(nm.unpack(result), weight)
    as_bitmask = nm.to_bitmask(result)
    bitmask.check(as_bitmask)
    assert same_bits(bitmask.unpack(as_bitmask), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_survive(dtype: torch.dtype) -> None:
    weight = torch.zeros(3, 16, dtype=dtype)
    weight[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-7]).to(dtype)
    weight[2] = 1.0
    weight[1, 3] = -0.0
    unpacked = bitmask.unpack(bitmask.pack(weight))
    weight[1, 3] = 0.0
    assert same_bits(unpacked, weight)


def test_groups_with_fewer_values_keep_zeros() -> None:
    weight = torch.zeros(2, 16)
    weight[0, 5] = 3.0
    result = nm.pack(weight, NM(2, 8))
    assert result.values.shape == (2, 4)
    assert torch.equal(nm.unpack(result), weight)


def test_two_of_four_codes_are_the_hardware_order() -> None:
    """Two bits for each position, the lower first, groups from the lowest bit up."""
    weight = torch.tensor([[0.0, 1.0, 0.0, 2.0, 3.0, 0.0, 4.0, 0.0]])
    assert nm.pack(weight, NM(2, 4)).positions.tolist() == [[1 | 3 << 2 | (0 | 2 << 2) << 4]]


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7, 0.8])
def test_bitmask_size(sparsity: float) -> None:
    weight = sparse_weight(512, 1024, sparsity, torch.bfloat16)
    share = packed.size(bitmask.pack(weight)) / (weight.numel() * 2)
    exact = 1 - int((weight != 0).sum()) / weight.numel()
    assert share == pytest.approx(1 / 16 + 1 - exact, rel=0.02)


@pytest.mark.parametrize(("pattern", "bits_per_weight"), [("2:4", 9), ("2:8", 4.75), ("4:8", 9), ("1:8", 2.375)])
def test_nm_size(pattern: str, bits_per_weight: float) -> None:
    weight = nm_weight(64, 256, NM.parse(pattern), torch.bfloat16)
    assert packed.size(nm.pack(weight, NM.parse(pattern))) * 8 == weight.numel() * bits_per_weight


@pytest.mark.parametrize(("pattern", "expected"), [("2:4", "2:4"), ("2:8", "2:8"), ("4:8", "4:8"), ("8:8", None)])
def test_smallest_kind_finds_the_pattern(pattern: str, expected: str | None) -> None:
    weight = nm_weight(64, 256, NM.parse(pattern), torch.bfloat16)
    assert packed.smallest_kind(weight) == expected


def test_smallest_kind_of_unstructured_weights() -> None:
    assert packed.smallest_kind(sparse_weight(64, 256, 0.6, torch.bfloat16)) == "bitmask"
    assert packed.smallest_kind(sparse_weight(64, 256, 0.01, torch.bfloat16)) is None


@pytest.mark.parametrize("kind", ["bitmask", "2:4", "2:8", "4:8"])
def test_cut_and_join(kind: str) -> None:
    pattern = NM(2, 8) if kind == "bitmask" else NM.parse(kind)
    weight = nm_weight(24, 256, pattern, torch.bfloat16)
    whole = packed.pack(weight, kind)
    rows = [packed.cut_rows(whole, start, start + 8) for start in (0, 8, 16)]
    columns = [packed.cut_columns(whole, start, start + 64) for start in range(0, 256, 64)]
    for part in [*rows, *columns]:
        packed.check(part, "part")
    assert torch.equal(packed.unpack(rows[1]), weight[8:16])
    assert torch.equal(torch.cat([packed.unpack(part) for part in columns], dim=1), weight)
    joined = packed.join_rows([rows[2], rows[0]])
    packed.check(joined, "joined")
    assert torch.equal(packed.unpack(joined), torch.cat([weight[16:], weight[:8]]))


def test_cut_inside_of_a_byte_is_refused() -> None:
    weight = nm_weight(4, 64, NM(2, 8), torch.float32)
    with pytest.raises(UserError, match="multiples of 8"):
        bitmask.cut_columns(bitmask.pack(weight), 4, 32)
    with pytest.raises(UserError, match="multiples of 64"):
        nm.cut_columns(nm.pack(weight, NM(2, 8)), 8, 64)


def test_what_cannot_be_packed() -> None:
    with pytest.raises(UserError, match="more than 2"):
        nm.pack(torch.ones(2, 8), NM(2, 4))
    with pytest.raises(UserError, match="whole groups"):
        nm.pack(torch.zeros(2, 6), NM(2, 4))
    with pytest.raises(UserError, match="Pack it as bitmask"):
        nm.pack(torch.zeros(2, 16), NM(2, 16))
    with pytest.raises(UserError, match="float64"):
        bitmask.pack(torch.zeros(2, 8, dtype=torch.float64))
    with pytest.raises(UserError, match="cannot be packed"):
        bitmask.pack(torch.zeros(8))


def damaged_bitmasks() -> dict[str, tuple[BitmaskWeight, str]]:
    good = bitmask.pack(sparse_weight(6, 20, 0.5, torch.float32))

    def change(**changes: object) -> BitmaskWeight:
        return dataclasses.replace(good, **changes)  # type: ignore[arg-type]

    offsets, mask, padding = good.offsets.clone(), good.mask.clone(), good.mask.clone()
    offsets[3] += 1
    mask[2, 0] ^= 4
    padding[1, -1] |= 128
    return {
        "offset": (change(offsets=offsets), "weight_offsets has"),
        "first offset": (change(offsets=good.offsets + 1), "weight_offsets has"),
        "mask bit": (change(mask=mask), "weight_offsets has"),
        "padding": (change(mask=padding), "beyond its last column"),
        "truncated values": (change(values=good.values[:-1]), "weight_values holds"),
        "truncated mask": (change(mask=good.mask[:-1]), "weight_mask is"),
        "truncated offsets": (change(offsets=good.offsets[:-1]), "weight_offsets is"),
        "offsets dtype": (change(offsets=good.offsets.long()), "weight_offsets is"),
        "values dtype": (change(values=good.values.double()), "float64"),
        "columns": (change(columns=30), "weight_mask is"),
    }


@pytest.mark.parametrize("case", list(damaged_bitmasks()))
def test_damaged_bitmask_is_refused(case: str) -> None:
    weight, message = damaged_bitmasks()[case]
    with pytest.raises(UserError, match=message) as caught:
        bitmask.check(weight, "layer.q_proj")
    assert "layer.q_proj" in str(caught.value)
    assert caught.value.fix is not None


def damaged_nm() -> dict[str, tuple[NMWeight, str]]:
    good = nm.pack(nm_weight(4, 24, NM(2, 8), torch.float32), NM(2, 8))

    def change(**changes: object) -> NMWeight:
        return dataclasses.replace(good, **changes)  # type: ignore[arg-type]

    equal, padding = good.positions.clone(), good.positions.clone()
    equal[0, 0] = 0
    padding[1, -1] |= 128
    return {
        "equal positions": (change(positions=equal), "does not keep 2 of 8"),
        "padding": (change(positions=padding), "beyond its last column"),
        "truncated values": (change(values=good.values[:, :-1]), "weight_values is"),
        "truncated positions": (change(positions=good.positions[:, :-1]), "weight_positions is"),
        "pattern": (change(pattern=NM(4, 8)), "weight_values is"),
    }


@pytest.mark.parametrize("case", list(damaged_nm()))
def test_damaged_nm_is_refused(case: str) -> None:
    weight, message = damaged_nm()[case]
    with pytest.raises(UserError, match=message):
        nm.check(weight, "layer.q_proj")
