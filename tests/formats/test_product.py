"""Products with prepared weights on the CPU against float64: every format and dtype, batches of 1 to 64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsedeploy.formats import bitmask, kernel_library, nm, packed, product, quantized
from sparsedeploy.formats.packed import PackedWeight
from sparsedeploy.formats.product import CpuWeight, StoredWeight, multiply, prepare
from sparsedeploy.formats.quantized import QuantizedWeight
from sparsedeploy.plan import NM
from tests.formats.test_packing import DTYPES, nm_weight, sparse_weight
from tests.formats.test_quantized import random_codes, random_scales

BATCHES = (1, 2, 3, 7, 16, 17, 64)
# Rounding of the result, as a share of the sum of absolute products.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-20}


@pytest.fixture(scope="module")
def library() -> kernel_library.Library:
    found = kernel_library.load()
    if found is None:
        pytest.skip("no C++ compiler: install g++")
    return found


def floating(dtype: torch.dtype) -> list[PackedWeight]:
    """Ragged rows, an empty and a full one, widths that are no multiple of a step, no zeros, zeros only."""
    result: list[PackedWeight] = []
    for rows, columns in ((1, 1), (7, 37), (70, 1000)):
        for sparsity in (0.0, 0.6, 1.0):
            weight = sparse_weight(rows, columns, sparsity, dtype)
            if rows > 2:
                weight[0] = 0
                weight[1] = 0.5
            result.append(bitmask.pack(weight))
    return [*result, *(nm.pack(nm_weight(24, 64, pattern, dtype), pattern) for pattern in (NM(2, 4), NM(4, 8)))]


def coded() -> list[PackedWeight]:
    result: list[PackedWeight] = []
    for bits in (8, 4):
        for group in (32, 64, 128):
            codes, scales = random_codes(33, group + 37, 0.5, bits), random_scales(33, group + 37, group)
            codes[0], scales[1] = 0, 0
            result.append(quantized.pack(codes, scales, bits, group))
    kept = nm_weight(24, 64, NM(2, 8), torch.float32) != 0
    codes = torch.where(kept, random_codes(24, 64, 0.0, 4), torch.zeros((), dtype=torch.int8))
    return [*result, quantized.pack(codes, random_scales(24, 64, 32), 4, 32, NM(2, 8))]


def check(weight: PackedWeight, dtype: torch.dtype, library: kernel_library.Library) -> None:
    dense, ready = packed.unpack(weight).double(), prepare(weight)
    assert isinstance(ready, CpuWeight)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(weight.rows, generator=generator).to(dtype)
    for batch in BATCHES:
        x = torch.randn(batch, weight.columns, generator=generator).to(dtype)
        rounding = torch.zeros_like(x, dtype=torch.float64)
        if isinstance(weight, QuantizedWeight):
            # Half a step of 8 bits, of the largest of 32 activations.
            padded = torch.nn.functional.pad(x.double().abs(), (0, -weight.columns % 32)).view(batch, -1, 32)
            rounding = padded.amax(dim=2).repeat_interleave(32, dim=1)[:, : weight.columns] / 253
        elif weight.values.dtype == torch.bfloat16 and library.instruction_set == "avx512bf16":
            rounding = x.double().abs() * 2**-8
        for added in (None, bias):
            exact = x.double() @ dense.T + (0 if added is None else added.double())
            scale = x.double().abs() @ dense.abs().T + bias.double().abs()
            allowed = TOLERANCE[dtype] * scale + rounding @ dense.abs().T + 1e-30
            assert bool(((multiply(x, ready, added).double() - exact).abs() <= allowed).all()), (batch, added is None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_floating_point_values(dtype: torch.dtype, library: kernel_library.Library) -> None:
    for weight in floating(dtype):
        check(weight, dtype, library)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes(dtype: torch.dtype, library: kernel_library.Library) -> None:
    for weight in coded():
        check(weight, dtype, library)


def test_many_rows_of_x_are_multiplied_either_way(
    library: kernel_library.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured once for each shape; unpacked in tiles where that is faster; codes are never unpacked."""
    monkeypatch.setattr(product, "_TILE_BYTES", 1000)
    weight = sparse_weight(150, 72, 0.6, torch.float32)
    x, bias = torch.randn(40, 72), torch.randn(150)
    times = iter((1.0, 2.0, 2.0, 1.0))
    measured: list[object] = []

    def best_time(call: object) -> float:
        measured.append(call)
        return next(times)

    monkeypatch.setattr(product, "_best_time", best_time)
    for wins in (False, True):
        product._unpacking_wins.clear()
        ready = prepare(bitmask.pack(weight))
        for _ in range(2):
            assert torch.allclose(multiply(x, ready, bias), x @ weight.T + bias, atol=1e-4)
        assert list(product._unpacking_wins.values()) == [wins]
    assert len(measured) == 4
    multiply(torch.randn(40, 64), prepare(quantized.pack(random_codes(8, 64, 0.5, 8), random_scales(8, 64, 32), 8, 32)))
    assert len(measured) == 4
    product._unpacking_wins.clear()


def test_strided_x_and_leading_dimensions(library: kernel_library.Library) -> None:
    weight = sparse_weight(24, 128, 0.6, torch.float32)
    ready = prepare(bitmask.pack(weight))
    x = torch.randn(2, 3, 256)[..., 64:192]
    for each in (x, x.transpose(0, 1), x[:, :0]):
        assert torch.allclose(multiply(each, ready), each @ weight.T, atol=1e-4)


def test_operator(library: kernel_library.Library) -> None:
    ready = prepare(bitmask.pack(sparse_weight(24, 64, 0.6, torch.float32)))
    assert isinstance(ready, CpuWeight)
    arguments = (torch.randn(3, 64), ready.address, ready.rows, torch.randn(24))
    torch.library.opcheck(torch.ops.sparsedeploy.cpu_linear.default, arguments)
    with pytest.raises(ValueError, match="not allowed"):
        multiply(torch.randn(3, 32), ready)


def test_without_a_compiler_weights_are_unpacked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    kernel_library.load.cache_clear()
    try:
        weight = sparse_weight(24, 64, 0.6, torch.bfloat16)
        ready = prepare(bitmask.pack(weight))
        assert isinstance(ready, StoredWeight)
        x = torch.randn(3, 64, dtype=torch.bfloat16)
        assert torch.equal(multiply(x, ready), x @ weight.T)
        assert torch.equal(multiply(x, ready.with_tensors(ready.tensors())), x @ weight.T)
        assert "Install g++" in caplog.text
    finally:
        kernel_library.load.cache_clear()
