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

from sparsedeploy_vllm import triton_kernels, tuning  # noqa: E402
from sparsedeploy_vllm.triton_kernels import Config  # noqa: E402

from sparsedeploy.formats import bitmask, nm  # noqa: E402
from sparsedeploy.formats.packed import PackedWeight  # noqa: E402
from sparsedeploy.plan import NM  # noqa: E402
from tests.formats.test_packing import nm_weight, sparse_weight  # noqa: E402

TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 2**-18}
VECTOR = (Config("vector", 4, 64, 4), Config("vector", 1, 128, 4))
TENSOR = (Config("tensor", 16, 64, 4),)


def check(dense: torch.Tensor, packed: PackedWeight, batches: tuple[int, ...]) -> None:
    assert torch.equal(triton_kernels.unpack(packed), dense)
    for batch in batches:
        x = torch.randn(batch, dense.shape[1]).to(dense.dtype)
        bias = torch.randn(dense.shape[0]).to(dense.dtype)
        exact = x.double() @ dense.double().T
        scale = x.double().abs() @ dense.double().abs().T + bias.double().abs()
        configs = VECTOR if batch <= triton_kernels.LARGEST_VECTOR_BATCH else ()
        for config, added in itertools.product((*configs, *TENSOR, None), (None, bias)):
            found = triton_kernels.linear(x, packed, added, config).double()
            wanted = exact if added is None else exact + added.double()
            worst = ((found - wanted).abs() - TOLERANCE[dense.dtype] * scale).max().item()
            assert worst <= 0, (config, dense.shape, dense.dtype, batch, worst)


def check_bitmask(dtype: torch.dtype) -> None:
    for rows, columns in ((7, 37), (20, 200), (1, 8), (3, 128)):
        weight = sparse_weight(rows, columns, 0.6, dtype)
        if rows > 2:
            weight[0] = 0
            weight[1] = 0.5
        check(weight, bitmask.pack(weight), (1, 3, 20) if columns == 200 else (2,))
    check(torch.zeros(5, 64, dtype=dtype), bitmask.pack(torch.zeros(5, 64, dtype=dtype)), (1,))


def check_nm(dtype: torch.dtype) -> None:
    for pattern in (NM(2, 4), NM(2, 8), NM(1, 4), NM(1, 8)):
        weight = nm_weight(9, 40, pattern, dtype)
        weight[3] = 0
        check(weight, nm.pack(weight, pattern), (1, 4, 20) if pattern.n == 2 else (2,))


def check_tuning(folder: Path) -> None:
    """The table takes what is measured fastest, keeps it on disk, and is not measured again."""
    tuning.cache_home = lambda: folder  # type: ignore[assignment]
    weight = bitmask.pack(sparse_weight(8, 64, 0.6, torch.float32))
    times = itertools.cycle([3.0, 1.0, 2.0])
    calls: list[object] = []

    def measure(call: object) -> float:
        calls.append(call)
        return next(times)

    assert tuning.config_for(weight, 1) == tuning.candidates(1)[0]
    tuning.tune(weight, measure)
    assert len(calls) == sum(len(tuning.candidates(bucket)) + 1 for bucket in tuning.BUCKETS)
    assert tuning.config_for(weight, 1) == tuning.candidates(1)[1]
    tuning._tables.clear()
    assert tuning.config_for(weight, 1) == tuning.candidates(1)[1]
    tuning.tune(weight, lambda call: 1 / 0)
    assert tuning.config_for(weight, 65) is None
    assert [tuning.bucket_of(batch) for batch in (1, 3, 5, 64, 65)] == [1, 4, 16, 64, None]


if __name__ == "__main__":
    torch.manual_seed(0)
    assert triton_kernels.INTERPRETED
    which, argument = sys.argv[1], sys.argv[2]
    if which == "tuning":
        check_tuning(Path(argument))
    else:
        {"bitmask": check_bitmask, "nm": check_nm}[which](getattr(torch, argument))
    print("checked")
