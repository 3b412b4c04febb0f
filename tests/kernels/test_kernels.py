"""The CPU kernels: every instruction set that this processor has, every type of value, odd shapes and batches."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.conftest import ISAS, Array, Library, Matrix, Refused, pointer

# (rows, columns): one weight, a whole tile, ragged tiles and groups, many groups.
SHAPES = ((1, 1), (16, 32), (33, 70), (100, 129), (17, 1100))
BATCHES = (1, 2, 3, 4, 5, 8, 9, 17)
CASES = [("f32", 0), ("bf16", 0), ("f16", 0), *((kind, group) for kind in ("int8", "int4") for group in (32, 64, 128))]


def sparse_mask(rows: int, columns: int, rng: np.random.Generator) -> Array:
    """About 40 % kept; where there are enough rows, one is empty and one full."""
    mask = rng.random((rows, columns)) < 0.4
    if rows > 2:
        mask[1], mask[2] = False, True
    return mask


def example(library: Library, kind: str, group: int, rows: int, columns: int, seed: int = 0) -> tuple[Matrix, Array]:
    """A packed matrix and its dense float32 values."""
    rng = np.random.default_rng(seed)
    mask = sparse_mask(rows, columns, rng)
    if group:
        low = -8 if kind == "int4" else -128
        codes = (rng.integers(low, -low, (rows, columns)) * mask).astype(np.int8)
        scales = (rng.random((rows, -(-columns // group))) * 0.1).astype(np.float16)
        dense = codes * scales.astype(np.float32)[:, np.arange(columns) // group]
        return library.quantized(kind, group, codes, scales), dense
    weight = (rng.standard_normal((rows, columns)) * mask).astype(np.float32)
    if kind == "f16":
        return library.dense(kind, weight.astype(np.float16)), weight.astype(np.float16).astype(np.float32)
    if kind == "bf16":
        bits = (weight.view(np.uint32) >> 16).astype(np.uint16)
        return library.dense(kind, bits), (bits.astype(np.uint32) << 16).view(np.float32)
    return library.dense(kind, weight), weight


def as_used(x: Array, kind: str, isa: str) -> Array:
    """The activations as the product sees them: rounded to int8 in groups of 32, or to bfloat16."""
    if kind.startswith("int"):
        columns = x.shape[1]
        padded = np.zeros((x.shape[0], -(-columns // 32) * 32), np.float32)
        padded[:, :columns] = x
        groups = padded.reshape(x.shape[0], -1, 32)
        largest = np.abs(groups).max(axis=2, keepdims=True)
        rounded = np.rint(groups * (np.float32(127) / largest)) * (largest / np.float32(127))
        return rounded.reshape(x.shape[0], -1)[:, :columns]
    if kind == "bf16" and isa == "avx512bf16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return x


@pytest.mark.parametrize(("kind", "group"), CASES)
@pytest.mark.parametrize("isa", ISAS)
def test_products(library: Library, isa: str, kind: str, group: int) -> None:
    """Against float64. Sums of up to 1100 float32 products are within 1e-5 of the largest result."""
    library.use(isa)
    for rows, columns in SHAPES:
        matrix, dense = example(library, kind, group, rows, columns)
        np.testing.assert_array_equal(matrix.unpack(), dense)
        for batch in BATCHES:
            x = np.random.default_rng(batch).standard_normal((batch, columns)).astype(np.float32)
            expected = as_used(x, kind, isa).astype(np.float64) @ dense.T.astype(np.float64)
            tolerance = 1e-5 * np.abs(expected).max() + 1e-12
            np.testing.assert_allclose(matrix.matmul(x, shares=1 + batch % 3), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("isa", ISAS)
def test_integers_are_exact(library: Library, isa: str, kind: str) -> None:
    """With scales and activations that leave nothing to round, all instruction sets give the exact sums."""
    library.use(isa)
    rng = np.random.default_rng(3)
    rows, columns, batch = 40, 200, 11
    low = -8 if kind == "int4" else -128
    codes = (rng.integers(low, -low, (rows, columns)) * sparse_mask(rows, columns, rng)).astype(np.int8)
    codes[0, :] = low
    scales = np.exp2(rng.integers(-1, 2, (rows, 7))).astype(np.float16)
    x = rng.integers(-127, 128, (batch, columns)).astype(np.float32)
    x[:, ::32] = 127
    dense = codes * scales.astype(np.float64)[:, np.arange(columns) // 32]
    matrix = library.quantized(kind, 32, codes, scales)
    for rows_of_x in (1, 2, batch):
        np.testing.assert_array_equal(matrix.matmul(x[:rows_of_x]), x[:rows_of_x].astype(np.float64) @ dense.T)


def gguf_blocks(kind: int, codes: Array, scales: Array, minimums: Array | None = None) -> Array:
    """GGUF's bytes of rows [rows, groups, 32] of codes."""
    rows, groups, _ = codes.shape
    parts = [scales.view(np.uint8).reshape(rows, groups, 2)]
    if minimums is not None:
        parts.append(minimums.view(np.uint8).reshape(rows, groups, 2))
    if kind == 8:
        parts.append(codes.astype(np.int8).view(np.uint8))
    else:
        parts.append((codes[:, :, :16] | codes[:, :, 16:] << 4).astype(np.uint8))
    return np.ascontiguousarray(np.concatenate(parts, axis=2))


@pytest.mark.parametrize(("kind", "low", "high", "zero"), [(8, -127, 128, 0), (2, 0, 16, 8), (3, 0, 15, 7)])
def test_gguf_blocks_are_kept_exactly(library: Library, kind: int, low: int, high: int, zero: int) -> None:
    rng = np.random.default_rng(kind)
    codes = rng.integers(low, high, (20, 3, 32))
    codes[rng.random(codes.shape) < 0.5] = zero
    scales = (rng.random((20, 3)) * 0.1 + 0.01).astype(np.float16)
    scales[4, 1] = 0
    # A minimum of exactly minus seven scales: code 7 is zero.
    minimums = None
    if kind == 3:
        scales = np.exp2(rng.integers(-6, 0, (20, 3))).astype(np.float16)
        minimums = (scales.astype(np.float32) * -7).astype(np.float16)
    matrix = library.gguf(kind, gguf_blocks(kind, codes, scales, minimums), 20, 96)
    dense = ((codes - zero) * scales.astype(np.float32)[:, :, None]).reshape(20, 96)
    np.testing.assert_array_equal(matrix.unpack(), dense)
    assert matrix.info.values == np.count_nonzero(dense)
    assert matrix.info.group == 32


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("isa", ISAS)
def test_full_matrices_equal_packed_ones(library: Library, isa: str, kind: str) -> None:
    """Zeros are stored like any value; sums come in the same order, so that products are the same bit for bit."""
    library.use(isa)
    rng = np.random.default_rng(0)
    for rows, columns in ((1, 32), (50, 96), (33, 1120)) if kind[0] == "q" else SHAPES:
        weight = (rng.standard_normal((rows, columns)) * (rng.random((rows, columns)) < 0.6)).astype(np.float32)
        if kind == "f32":
            number, data, bits = 0, weight, 32.0
        elif kind == "f16":
            number, data, bits = 1, weight.astype(np.float16), 16.0
        elif kind == "bf16":
            number, data, bits = 30, (weight.view(np.uint32) >> 16).astype(np.uint16), 16.0
        else:
            number, bits = (8, 8.5) if kind == "q8_0" else (2, 4.5)
            low, high = (-127, 127) if kind == "q8_0" else (-8, 7)
            codes = rng.integers(low, high, (rows, columns // 32, 32)) * (rng.random((rows, columns // 32, 32)) < 0.6)
            data = gguf_blocks(
                number, codes + (8 if kind == "q4_0" else 0), rng.random(codes.shape[:2]).astype(np.float16)
            )
        packed, full = (library.gguf(number, data, rows, columns, full=whole) for whole in (False, True))
        assert full.info.values == rows * columns
        np.testing.assert_array_equal(full.unpack(), packed.unpack())
        np.testing.assert_array_equal(full.unpack(rows // 2), packed.unpack(rows // 2))
        for batch in BATCHES:
            x = rng.standard_normal((batch, columns)).astype(np.float32)
            np.testing.assert_array_equal(full.matmul(x, shares=1 + batch % 3), packed.matmul(x))
        if rows == 33 and columns > 1000:
            stored = full.info.bytes * 8 / (48 * -(-columns // 32) * 32)
            assert bits <= stored <= bits + 0.2


def test_q4_1_without_an_exact_zero_is_refused(library: Library) -> None:
    scales = np.full((1, 1), 0.3, np.float16)
    blocks = gguf_blocks(3, np.ones((1, 1, 32), np.int64), scales, np.full((1, 1), -1, np.float16))
    with pytest.raises(Refused, match="5"):
        library.gguf(3, blocks, 1, 32)


def test_masks_keep_zeros_and_drop_values(library: Library) -> None:
    weight = np.arange(64, dtype=np.float32).reshape(2, 32)
    mask = np.zeros((2, 32), np.uint8)
    mask[0, :5] = 1
    matrix = library.dense("f32", weight, mask)
    assert matrix.info.values == 5
    np.testing.assert_array_equal(matrix.unpack(), weight * mask)


def test_size(library: Library) -> None:
    """One mask bit, the values, 16 bits a group of 32."""
    rng = np.random.default_rng(0)
    codes = rng.integers(1, 8, (512, 1024)).astype(np.int8)
    codes[rng.random(codes.shape) < 0.5] = 0
    scales = np.ones((512, 32), np.float16)
    for kind, expected in (("int8", 5.5), ("int4", 3.53)):
        matrix = library.quantized(kind, 32, codes, scales)
        assert matrix.info.bytes * 8 / codes.size == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite_give_nan(library: Library, isa: str, bad: float) -> None:
    library.use(isa)
    matrix = library.quantized("int8", 32, np.ones((16, 64), np.int8), np.ones((16, 2), np.float16))
    x = np.ones((2, 64), np.float32)
    x[1, 40] = bad
    out = matrix.matmul(x)
    np.testing.assert_allclose(out[0], 64)
    assert np.isnan(out[1]).all()


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_scales_that_are_not_finite_are_refused(library: Library, scale: float) -> None:
    scales = np.full((2, 1), scale, np.float16)
    with pytest.raises(Refused, match="3"):
        library.quantized("int8", 32, np.ones((2, 32), np.int8), scales)
    with pytest.raises(Refused, match="3"):
        library.gguf(8, gguf_blocks(8, np.ones((2, 1, 32), np.int64), scales), 2, 32)


def test_codes_out_of_range_are_refused(library: Library) -> None:
    with pytest.raises(Refused, match="4"):
        library.quantized("int4", 32, np.full((2, 32), 8, np.int8), np.ones((2, 1), np.float16))


def test_bad_arguments_are_refused(library: Library) -> None:
    weight = np.ones((32, 32), np.float32)
    matrix = library.dense("f32", weight)
    handle, data = matrix.handle, pointer(weight)
    out = ctypes.c_void_p()
    bad = [
        ("pack_dense", 3, data, 32, 32, 32, None, 1, ctypes.byref(out)),
        ("pack_dense", 0, None, 32, 32, 32, None, 1, ctypes.byref(out)),
        ("pack_dense", 0, data, 31, 32, 32, None, 1, ctypes.byref(out)),
        ("pack_dense", 0, data, 32, 0, 32, None, 1, ctypes.byref(out)),
        ("pack_quantized", 3, 48, data, data, 1, 32, None, 1, ctypes.byref(out)),
        ("pack_gguf", 7, data, 34, 1, 32, 1, ctypes.byref(out)),
        ("pack_gguf", 8, data, 33, 1, 32, 1, ctypes.byref(out)),
        ("pack_gguf", 8, data, 34, 1, 31, 1, ctypes.byref(out)),
        ("unpack", handle, 0, 33, data, 32),
        ("matmul", handle, data, 1, 8, 32, data, 32),
        ("matmul", handle, data, 1, 0, 24, data, 32),
        ("matmul", handle, data, 1, 0, 48, data, 32),
        ("matmul", handle, data, 1, 0, 32, data, 31),
    ]
    for name, *arguments in bad:
        with pytest.raises(Refused, match="1"):
            library.call(name, *arguments)
    assert out.value is None
    assert library.c.sd_status_text(5).startswith(b"the blocks have no exact zero")


@pytest.mark.slow
def test_the_environment_chooses_the_instruction_set(library_path: Path) -> None:
    code = (
        "import ctypes, sys, torch; library = ctypes.CDLL(sys.argv[1]);"
        "library.sd_isa_name.restype = ctypes.c_char_p; print(library.sd_isa_name().decode())"
    )

    def chosen(name: str) -> tuple[str, str]:
        environment = {**os.environ, "SPARSEDEPLOY_ISA": name}
        command = [sys.executable, "-c", code, str(library_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip(), done.stderr

    assert chosen("portable") == ("portable", "")
    name, complaint = chosen("avx1024")
    assert name in ISAS
    assert "SPARSEDEPLOY_ISA=avx1024 is unknown" in complaint
