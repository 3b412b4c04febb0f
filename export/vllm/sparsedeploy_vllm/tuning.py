"""Which kernel runs a product on a GPU: a small table, measured once for each device and shape and kept on disk.

Untested on a GPU so far: the table's logic is tested, its contents are defaults until :func:`tune` has run on one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch

from sparsedeploy.folders import write_json
from sparsedeploy.resources import cache_home
from sparsedeploy_vllm.gpu import LARGEST_TENSOR_BATCH, LARGEST_VECTOR_BATCH, Config, GpuWeight, linear

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 16, 32, 64)
_VECTOR = (
    Config("vector", 4, 1024, 4),
    Config("vector", 8, 256, 1),
    Config("vector", 4, 512, 2),
    Config("vector", 1, 1024, 4),
)
_TENSOR = (Config("tensor", 32, 64, 4, 3), Config("tensor", 64, 64, 4, 3), Config("tensor", 32, 128, 4, 2))
# Measured in place of a kernel's configuration: unpack and multiply densely.
_DENSE = "dense"
_tables: dict[str, dict[str, Config | None]] = {}


def bucket_of(batch: int) -> int | None:
    """The table's batch size for a batch; None above the largest, where weights are unpacked."""
    return next((bucket for bucket in BUCKETS if batch <= bucket), None)


def candidates(bucket: int) -> tuple[Config, ...]:
    """The configurations that are worth measuring for a batch size."""
    assert BUCKETS[-1] == LARGEST_TENSOR_BATCH
    return (*_VECTOR, *_TENSOR) if bucket <= LARGEST_VECTOR_BATCH else _TENSOR


def config_for(weight: GpuWeight, batch: int, dtype: torch.dtype) -> Config | None:
    """The configuration for a product: measured where there is one, else a default; None means unpack."""
    bucket = bucket_of(batch)
    if bucket is None:
        return None
    return _table(_device_name(weight)).get(_key(weight, bucket, dtype), candidates(bucket)[0])


def tune(
    weight: GpuWeight,
    dtype: torch.dtype,
    measure: Callable[[Callable[[], torch.Tensor]], float] | None = None,
    buckets: Sequence[int] = BUCKETS,
) -> dict[int, dict[Config | None, float]]:
    """Measure every candidate for a weight's shape, unless the table has it, and remember the fastest.

    Args:
        dtype: of the activations.
        measure: milliseconds that a function takes; by default Triton's benchmark on the device.

    Returns:
        For each batch size that was measured now, the time of every configuration; None is the dense product.
    """
    if measure is None:
        from triton.testing import do_bench

        measure = do_bench
    device = _device_name(weight)
    table = _table(device)
    found: dict[int, dict[Config | None, float]] = {}
    for bucket in buckets:
        if _key(weight, bucket, dtype) in table:
            continue
        x = torch.randn(bucket, weight.columns, device=weight.values.device).to(dtype)
        timed = {config: measure(_call(x, weight, config)) for config in (*candidates(bucket), None)}
        table[_key(weight, bucket, dtype)] = min(timed, key=lambda config: timed[config])
        found[bucket] = timed
    if found:
        try:
            write_json(_path(device), {key: asdict(value) if value else _DENSE for key, value in sorted(table.items())})
        except Exception as error:
            logger.warning("the measured kernel table is not kept (%s)", error)
    return found


def _call(x: torch.Tensor, weight: GpuWeight, config: Config | None) -> Callable[[], torch.Tensor]:
    return lambda: linear(x, weight, None, config)


def _key(weight: GpuWeight, bucket: int, dtype: torch.dtype) -> str:
    kind = str(weight.pattern)
    if weight.pattern is None:
        count = weight.values.numel() * (2 if weight.bits == 4 else 1)
        kind = f"bitmask{round(count / max(1, weight.rows * weight.columns) * 10)}"
    if weight.bits:
        kind += f" int{weight.bits} group {weight.group}"
    return f"{kind} {weight.rows}x{weight.columns} {str(dtype).removeprefix('torch.')} batch {bucket}"


def _table(device: str) -> dict[str, Config | None]:
    if device not in _tables:
        _tables[device] = _read(_path(device))
    return _tables[device]


def _read(path: Path) -> dict[str, Config | None]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {key: None if value == _DENSE else Config(**value) for key, value in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _path(device: str) -> Path:
    safe = "".join(letter if letter.isalnum() else "-" for letter in device)
    return cache_home() / "kernels" / f"gpu-table-{safe}.json"


def _device_name(weight: GpuWeight) -> str:
    device = weight.values.device
    return _cuda_name(device.index or 0) if device.type == "cuda" else device.type


@lru_cache(maxsize=16)
def _cuda_name(index: int) -> str:
    return str(torch.cuda.get_device_name(index))
