"""Packed or dense on a CPU: decided for each layer when it is loaded, by a measurement of both.

Packed weights win where memory is the limit. Few cores with much bandwidth each, small layers that stay in the cache,
or little sparsity can make the dense product faster; then the layer is unpacked once and stays dense.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from sparsedeploy.errors import UserError
from sparsedeploy.formats import packed as packing
from sparsedeploy.formats.packed import PackedWeight
from sparsedeploy.formats.product import multiply, prepare

VARIABLE = "SPARSEDEPLOY_CPU"
BATCH_VARIABLE = "SPARSEDEPLOY_CPU_BATCH"
# Packed is kept as long as it reaches this share of the dense speed: the memory it saves is worth a little time.
SMALLEST_SHARE = 0.9
_REPETITIONS = 5
# Read between two measurements, so that weights come from memory as they do when a whole model runs. Writing would not
# do: the processor writes it back while the product runs.
_FLUSH_VALUES = 32 << 20
Product = Callable[[torch.Tensor], torch.Tensor]
_decided: dict[tuple[object, ...], Choice] = {}


@dataclass(frozen=True)
class Choice:
    """What was measured for a shape.

    Attributes:
        packed_ms, dense_ms: best times; 0 where the user decided.
        batch: tokens that were multiplied at once.
    """

    packed: bool
    packed_ms: float = 0.0
    dense_ms: float = 0.0
    batch: int = 1

    @property
    def reason(self) -> str:
        if not self.dense_ms:
            return f"{VARIABLE} says so"
        return f"packed {self.packed_ms:.3f} ms, dense {self.dense_ms:.3f} ms at batch {self.batch}"


def torch_dense(weight: torch.Tensor) -> Product:
    """torch's own dense product."""
    return lambda x: functional.linear(x, weight)


def choose(weight: PackedWeight, dtype: torch.dtype, dense: Callable[[torch.Tensor], Product] = torch_dense) -> Choice:
    """Decide for a CPU weight; equal shapes and formats of about equal sparsity are measured once.

    Args:
        dtype: of the activations.
        dense: makes the product that would be used instead, from the dense weight.

    The environment variable ``SPARSEDEPLOY_CPU`` (``packed`` or ``dense``) decides instead of the measurement;
    ``SPARSEDEPLOY_CPU_BATCH`` is the number of sequences to decide for, by default 1: many at once are bound by
    arithmetic, where the dense product is the faster one.

    Raises:
        UserError: another value of a variable.
    """
    wish = os.environ.get(VARIABLE, "auto")
    if wish not in ("auto", "packed", "dense"):
        raise UserError(f"{VARIABLE} is '{wish}'", "Set it to auto, packed or dense.")
    if wish != "auto":
        return Choice(packed=wish == "packed")
    number = os.environ.get(BATCH_VARIABLE, "1")
    if not number.isdecimal() or int(number) < 1:
        raise UserError(
            f"{BATCH_VARIABLE} is '{number}'", "Set it to the number of sequences that run at once, from 1."
        )
    batch = int(number)
    density = weight.count / max(1, weight.rows * weight.columns)
    kind = packing.describe(weight)
    values = (weight.values.dtype, kind.bits, kind.group, dtype)
    key = (weight.rows, weight.columns, *values, round(density, 1), torch.get_num_threads(), batch)
    if key not in _decided:
        _decided[key] = measure(weight, dtype, dense, batch)
    return _decided[key]


def measure(
    weight: PackedWeight,
    dtype: torch.dtype,
    dense: Callable[[torch.Tensor], Product] = torch_dense,
    batch: int = 1,
) -> Choice:
    """Time both products of ``batch`` tokens by turns, each from memory, and take the best of each."""
    x = torch.randn(batch, weight.columns).to(dtype)
    flush = torch.ones(_FLUSH_VALUES)
    ready = prepare(weight)
    products: tuple[Product, ...] = (lambda x: multiply(x, ready), dense(packing.unpack(weight).to(dtype)))
    best = [float("inf")] * len(products)
    for repetition in range(_REPETITIONS + 1):
        for index, product in enumerate(products):
            flush.sum()
            started = time.perf_counter()
            product(x)
            # The first round warms up.
            if repetition:
                best[index] = min(best[index], (time.perf_counter() - started) * 1e3)
    return Choice(packed=best[1] >= SMALLEST_SHARE * best[0], packed_ms=best[0], dense_ms=best[1], batch=batch)
