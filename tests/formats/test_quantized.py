"""int8 and int4 codes with scales: exact round trips, sizes on files, cuts and joins, and damaged tensors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sparsedeploy.errors import UserError
from sparsedeploy.formats import nm, packed, quantized
from sparsedeploy.formats.config import ModuleFormat, PackedConfig
from sparsedeploy.formats.quantized import QuantizedWeight
from sparsedeploy.plan import NM


def random_codes(rows: int, columns: int, sparsity: float, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = -(2 ** (bits - 1))
    codes = torch.randint(low, -low, (rows, columns), generator=generator, dtype=torch.int8)
    codes[codes == 0] = 1
    keep = torch.rand(rows, columns, generator=generator) >= sparsity
    return torch.where(keep, codes, torch.zeros((), dtype=torch.int8))


def random_scales(rows: int, columns: int, group: int) -> torch.Tensor:
    return (torch.rand(rows, -(-columns // group), generator=torch.Generator().manual_seed(1)) * 0.1).half()


def example(bits: int = 4, pattern: str | None = None, rows: int = 8, columns: int = 128) -> QuantizedWeight:
    codes = random_codes(rows, columns, 0.5, bits)
    if pattern is not None:
        n, m = NM.parse(pattern).n, NM.parse(pattern).m
        order = torch.rand(rows, columns // m, m, generator=torch.Generator().manual_seed(2)).argsort(dim=2)
        codes = torch.where(order.reshape(rows, columns) < n, random_codes(rows, columns, 0.0, bits), 0).to(torch.int8)
    scales = random_scales(rows, columns, 32)
    return quantized.pack(codes, scales, bits, 32, None if pattern is None else NM.parse(pattern))


def through_tensors(weight: QuantizedWeight) -> packed.PackedWeight:
    return packed.from_tensors("m", packed.describe(weight), weight.tensors())


def assert_same(first: packed.PackedWeight, second: packed.PackedWeight) -> None:
    assert packed.describe(first) == packed.describe(second)
    tensors = second.tensors()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in first.tensors().items())


@given(
    rows=st.integers(0, 9),
    columns=st.integers(1, 200),
    sparsity=st.floats(0, 1),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_round_trip(rows: int, columns: int, sparsity: float, bits: int, group: int, seed: int) -> None:
    codes, scales = random_codes(rows, columns, sparsity, bits, seed), random_scales(rows, columns, group)
    back = through_tensors(quantized.pack(codes, scales, bits, group))
    assert isinstance(back, QuantizedWeight)
    assert torch.equal(quantized.unpack_codes(back), codes)
    assert torch.equal(back.scales, scales)
    column = torch.arange(columns)
    assert torch.equal(packed.unpack(back), codes.float() * scales.float()[:, column // group])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "2:8"])
def test_nm_round_trip(pattern: str, bits: int) -> None:
    weight = example(bits, pattern)
    back = through_tensors(weight)
    assert isinstance(back, QuantizedWeight)
    assert torch.equal(quantized.unpack_codes(back), quantized.unpack_codes(weight))
    assert packed.describe(back).kind == pattern
    assert packed.describe(back).bits == bits


def test_nibbles_are_two_s_complement_low_half_first() -> None:
    codes = torch.tensor([-8, 7, -1], dtype=torch.int8)
    assert quantized.pack_nibbles(codes).tolist() == [0x78, 0x0F]
    assert torch.equal(quantized.unpack_nibbles(quantized.pack_nibbles(codes), 3), codes)


@pytest.mark.parametrize(("bits", "sparsity", "expected"), [(8, 0.5, 5.5), (8, 0.7, 3.9), (4, 0.5, 3.5), (4, 0.7, 2.7)])
def test_bits_per_weight_on_file(bits: int, sparsity: float, expected: float, tmp_path: Path) -> None:
    rows, columns = 512, 2048
    codes = random_codes(rows, columns, sparsity, bits)
    weight = quantized.pack(codes, random_scales(rows, columns, 32), bits, 32)
    save_file(weight.tensors(), tmp_path / "weight.safetensors")
    size = (tmp_path / "weight.safetensors").stat().st_size
    # One part in a hundred for the row offsets, the header and the share of zeros that came out.
    assert size * 8 / codes.numel() == pytest.approx(expected, rel=0.01)
    assert_same(packed.from_tensors("m", packed.describe(weight), load_file(tmp_path / "weight.safetensors")), weight)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_rows_and_columns_are_cut_and_joined(pattern: str | None) -> None:
    weight = example(4, pattern)
    dense = packed.unpack(weight)
    parts = [packed.cut_rows(weight, 0, 3), packed.cut_rows(weight, 3, 8)]
    assert packed.can_join(parts[0], parts[1])
    assert_same(packed.join_rows(parts), weight)
    right = packed.cut_columns(weight, 64, 128)
    packed.check(right, "m")
    assert torch.equal(packed.unpack(right), dense[:, 64:])


def test_cuts_inside_of_a_group_are_refused() -> None:
    weight = example()
    assert packed.can_cut_columns(packed.describe(weight), 32)
    assert not packed.can_cut_columns(packed.describe(weight), 16)
    with pytest.raises(UserError, match="multiples of 32"):
        packed.cut_columns(weight, 16, 128)


def test_different_bits_are_not_joined() -> None:
    assert not packed.can_join(example(4), example(8))
    with pytest.raises(UserError, match="cannot be joined"):
        packed.join_rows([example(4), example(8)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": torch.full((8, 4), float("nan"), dtype=torch.float16)}, "NaN or infinite"),
        ({"scales": torch.full((8, 4), float("inf"), dtype=torch.float16)}, "NaN or infinite"),
        ({"scales": torch.ones(8, 3, dtype=torch.float16)}, "weight_scales"),
        ({"scales": torch.ones(8, 4)}, "weight_scales"),
        ({"bits": 3}, "3-bit"),
        ({"group": 48}, "groups of 48"),
    ],
)
def test_damaged_weights_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        packed.check(dataclasses.replace(example(), **changes), "m")  # type: ignore[arg-type]


def test_codes_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="outside of -8 to 7"):
        quantized.pack(torch.full((1, 32), 8, dtype=torch.int8), torch.ones(1, 1, dtype=torch.float16), 4, 32)
    with pytest.raises(UserError, match=r"not torch\.int8"):
        quantized.pack(torch.ones(1, 32), torch.ones(1, 1, dtype=torch.float16), 8, 32)


def test_a_wrong_number_of_stored_values_is_refused() -> None:
    weight = example()
    tensors = {**weight.tensors(), "weight_values": weight.tensors()["weight_values"][:-1]}
    with pytest.raises(UserError, match="weight_values holds"):
        packed.from_tensors("m", packed.describe(weight), tensors)


def test_codes_without_bits_in_the_config_are_refused() -> None:
    weight = example(8)
    entry = dataclasses.replace(packed.describe(weight), bits=None, group=None)
    with pytest.raises(UserError, match="no bits and group"):
        packed.from_tensors("m", entry, weight.tensors())


def test_zero_scales_give_zeros() -> None:
    weight = dataclasses.replace(example(), scales=torch.zeros(8, 4, dtype=torch.float16))
    packed.check(weight, "m")
    assert not packed.unpack(weight).any()


def test_n_m_codes_of_int8_are_checked_as_such() -> None:
    weight = example(8, "2:4")
    assert isinstance(weight.codes, nm.NMWeight)
    damaged = dataclasses.replace(weight.codes, positions=torch.zeros_like(weight.codes.positions))
    with pytest.raises(UserError, match="does not keep"):
        packed.check(dataclasses.replace(weight, codes=damaged), "m")


def test_config_round_trip_and_refusals() -> None:
    config = PackedConfig({"m": ModuleFormat("bitmask", 8, 128, 500, 4, 32)})
    assert PackedConfig.from_dict(config.to_dict()) == config
    for changes in ({"bits": 3}, {"group": 16}, {"bits": None}):
        values = config.to_dict()
        values["modules"]["m"].update(changes)
        with pytest.raises(UserError, match=r"m has codes of .* bits in groups"):
            PackedConfig.from_dict(values)
