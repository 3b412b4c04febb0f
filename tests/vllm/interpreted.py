"""The Triton kernels in Triton's interpreter against a float64 product. Run as a program by test_triton.py.

A process of its own: whether Triton interprets or compiles is settled when it is imported.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "export" / "vllm")]

from sparsedeploy_vllm import gpu, tuning  # noqa: E402
from sparsedeploy_vllm.gpu import Config  # noqa: E402

from sparsedeploy.formats import bitmask, nm, packed, quantized  # noqa: E402
from sparsedeploy.formats.packed import PackedWeight  # noqa: E402
from sparsedeploy.formats.product import multiply  # noqa: E402
from sparsedeploy.plan import NM  # noqa: E402
from tests.formats.test_packing import nm_weight, sparse_weight  # noqa: E402
from tests.formats.test_quantized import random_codes, random_scales  # noqa: E402

TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 2**-18}
VECTOR = (Config("vector", 4, 64, 4), Config("vector", 1, 128, 4))
TENSOR = (Config("tensor", 16, 64, 4),)


def check(weight: PackedWeight, dtype: torch.dtype, batches: tuple[int, ...]) -> None:
    """Every kernel on a weight: what it unpacks to, and products with and without a bias."""
    dense, ready = packed.unpack(weight), gpu.prepare(weight)
    # The interpreter cuts a float32 off where hardware rounds it to bfloat16: weights from codes, too.
    cut = 2**-7 if ready.bits and dtype == torch.bfloat16 else 0.0
    assert torch.allclose(gpu.unpack(ready, dtype), dense.to(dtype), rtol=cut, atol=0)
    for batch in batches:
        x = torch.randn(batch, dense.shape[1]).to(dtype)
        bias = torch.randn(dense.shape[0]).to(dtype)
        exact = x.double() @ dense.double().T
        scale = x.double().abs() @ dense.double().abs().T + bias.double().abs()
        configs = VECTOR if batch <= gpu.LARGEST_VECTOR_BATCH else ()
        for config, added in itertools.product((*configs, *TENSOR, None), (None, bias)):
            found = gpu.linear(x, ready, added, config).double()
            wanted = exact if added is None else exact + added.double()
            worst = ((found - wanted).abs() - (TOLERANCE[dtype] + cut) * scale).max().item()
            assert worst <= 0, (config, dense.shape, dtype, batch, worst)


def check_bitmask(dtype: torch.dtype) -> None:
    for rows, columns in ((7, 37), (20, 200), (1, 8), (3, 128)):
        weight = sparse_weight(rows, columns, 0.6, dtype)
        if rows > 2:
            weight[0] = 0
            weight[1] = 0.5
        check(bitmask.pack(weight), dtype, (1, 3, 20) if columns == 200 else (2,))
    check(bitmask.pack(torch.zeros(5, 64, dtype=dtype)), dtype, (1,))


def check_nm(dtype: torch.dtype) -> None:
    for pattern in (NM(2, 4), NM(2, 8), NM(1, 4), NM(1, 8), NM(4, 8)):
        weight = nm_weight(9, 40, pattern, dtype)
        weight[3] = 0
        check(nm.pack(weight, pattern), dtype, (1, 4, 20) if pattern.n == 2 else (2,))


def check_codes(dtype: torch.dtype) -> None:
    """int8 and int4 codes: every group size, odd widths, an empty row, a full one, a scale of zero, N:M."""
    for bits, group in itertools.product((8, 4), (32, 64, 128)):
        rows, columns = (7, group + 37) if group != 64 else (5, 200)
        codes = random_codes(rows, columns, 0.5, bits)
        codes[0] = 0
        codes[1] = -(2 ** (bits - 1))
        scales = random_scales(rows, columns, group)
        scales[2] = 0
        check(quantized.pack(codes, scales, bits, group), dtype, (1, 4, 20) if group == 64 else (2,))
        for pattern in (NM(2, 4), NM(1, 8), NM(4, 8)) if group == 32 else ():
            kept = nm_weight(rows, 72, pattern, torch.float32) != 0
            codes = torch.where(kept, random_codes(rows, 72, 0.0, bits), torch.zeros((), dtype=torch.int8))
            weight = quantized.pack(codes, random_scales(rows, 72, group), bits, group, pattern)
            check(weight, dtype, (1, 20) if pattern.n == 2 else (2,))
    empty = quantized.pack(torch.zeros(5, 64, dtype=torch.int8), random_scales(5, 64, 32), 4, 32)
    check(empty, dtype, (1,))


def check_operator(folder: Path) -> None:
    """The torch operator: every format, its shape under ``torch.compile``'s fake tensors, and what it refuses."""
    tuning.cache_home = lambda: folder  # type: ignore[assignment]
    codes = quantized.pack(random_codes(24, 64, 0.5, 4), random_scales(24, 64, 32), 4, 32)
    floats = nm_weight(24, 64, NM(2, 8), torch.float32)
    for weight in (codes, bitmask.pack(floats), nm.pack(floats, NM(2, 8))):
        ready, dense = gpu.prepare(weight), packed.unpack(weight)
        for batch in (1, 70):
            x, bias = torch.randn(2, batch, 64), torch.randn(24)
            assert torch.allclose(multiply(x, ready, bias), x @ dense.T + bias, atol=1e-4)
        tensors = (ready.values, ready.places, ready.offsets, ready.scales)
        sizes = (2, 8) if ready.pattern else (0, 0)
        arguments = (x[0], *tensors, *sizes, ready.group, bias)
        torch.library.opcheck(torch.ops.sparsedeploy.gpu_linear.default, arguments)
        try:
            multiply(torch.randn(1, 32), ready)
        except ValueError as error:
            assert "does not fit" in str(error)  # noqa: PT017 - this is a program
        else:
            raise AssertionError("half a row was taken")


def check_tuning(folder: Path) -> None:
    """The table takes what is measured fastest, keeps it on disk, and is not measured again."""
    tuning.cache_home = lambda: folder  # type: ignore[assignment]
    dtype = torch.float32
    weight = gpu.prepare(bitmask.pack(sparse_weight(8, 64, 0.6, dtype)))
    times = itertools.cycle([3.0, 1.0, 2.0])
    calls: list[object] = []

    def measure(call: object) -> float:
        calls.append(call)
        return next(times)

    assert tuning.config_for(weight, 1, dtype) == tuning.candidates(1)[0]
    found = tuning.tune(weight, dtype, measure)
    assert len(calls) == sum(len(tuning.candidates(bucket)) + 1 for bucket in tuning.BUCKETS)
    assert found[1][tuning.candidates(1)[1]] == 1.0
    assert tuning.config_for(weight, 1, dtype) == tuning.candidates(1)[1]
    tuning._tables.clear()
    assert tuning.config_for(weight, 1, dtype) == tuning.candidates(1)[1]
    assert tuning.tune(weight, dtype, lambda call: 1 / 0) == {}
    assert tuning.config_for(weight, 65, dtype) is None
    codes = gpu.prepare(quantized.pack(random_codes(8, 64, 0.6, 4), random_scales(8, 64, 32), 4, 32))
    assert tuning.config_for(codes, 1, dtype) == tuning.candidates(1)[0]
    assert [tuning.bucket_of(batch) for batch in (1, 3, 5, 64, 65)] == [1, 4, 16, 64, None]


if __name__ == "__main__":
    torch.manual_seed(0)
    assert gpu.INTERPRETED
    which, argument = sys.argv[1], sys.argv[2]
    if which in ("tuning", "operator"):
        {"tuning": check_tuning, "operator": check_operator}[which](Path(argument))
    else:
        for name in argument.split(","):
            {"bitmask": check_bitmask, "nm": check_nm, "codes": check_codes}[which](getattr(torch, name))
    print("checked")
