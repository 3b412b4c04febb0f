"""The packed product as torch operators, so that ``torch.compile`` and CUDA graphs see one opaque call.

``sparsedeploy::bitmask_linear`` and ``sparsedeploy::nm_linear`` have a CPU and a CUDA implementation and a fake one
that only tells the result's shape. Their tensors must have been checked when they were loaded.
"""

from __future__ import annotations

from typing import overload

import torch

from sparsedeploy.formats import nm
from sparsedeploy.formats.bitmask import BitmaskWeight
from sparsedeploy.formats.nm import NMWeight
from sparsedeploy.formats.packed import FloatWeight, PackedWeight
from sparsedeploy.plan import NM
from sparsedeploy_vllm import cpu

_LIBRARY = torch.library.Library("sparsedeploy", "DEF")
_LIBRARY.define("bitmask_linear(Tensor x, Tensor mask, Tensor values, Tensor offsets, Tensor? bias) -> Tensor")
_LIBRARY.define("nm_linear(Tensor x, Tensor values, Tensor positions, int n, int m, Tensor? bias) -> Tensor")


@overload
def prepare(weight: FloatWeight) -> FloatWeight: ...


@overload
def prepare(weight: PackedWeight) -> PackedWeight: ...


def prepare(weight: PackedWeight) -> PackedWeight:
    """The form in which a weight's device multiplies it best, still packed.

    CPU kernels read mask bits: N:M becomes a bitmask (of the same size for 2:4 and 4:8, 5 % larger for 2:8). GPU
    kernels read N:M positions; patterns that are stored as mask bits anyway become bitmasks.
    """
    if isinstance(weight, NMWeight) and (weight.values.device.type == "cpu" or not nm.stores_positions(weight.pattern)):
        return nm.to_bitmask(weight)
    return weight


def packed_product(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x [..., columns]`` times a packed weight ``[rows, columns]``, plus a bias ``[rows]``: ``[..., rows]``.

    x, values and bias share one dtype and device.
    """
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(weight, BitmaskWeight):
        out = torch.ops.sparsedeploy.bitmask_linear(flat, weight.mask, weight.values, weight.offsets, bias)
    elif isinstance(weight, NMWeight):
        pattern = weight.pattern
        out = torch.ops.sparsedeploy.nm_linear(flat, weight.values, weight.positions, pattern.n, pattern.m, bias)
    else:
        raise TypeError("weights of int8 and int4 codes have no product here")
    return out.reshape(*x.shape[:-1], weight.rows)


def _bitmask_weight(x: torch.Tensor, mask: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor) -> BitmaskWeight:
    columns = x.shape[1]
    if mask.shape[1] != -(-columns // 8) or x.dtype != values.dtype:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} does not fit a packed weight with {mask.shape[1]} mask bytes in a row and "
            f"{values.dtype} values"
        )
    return BitmaskWeight(mask.shape[0], columns, mask, values, offsets)


def _nm_weight(x: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, n: int, m: int) -> NMWeight:
    columns = x.shape[1]
    if values.shape[1] * m != columns * n or x.dtype != values.dtype:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} does not fit a packed {n}:{m} weight with {values.shape[1]} {values.dtype} "
            "values in a row"
        )
    return NMWeight(values.shape[0], columns, NM(n, m), values, positions)


def _bitmask_cpu(
    x: torch.Tensor, mask: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return cpu.linear(x, _bitmask_weight(x, mask, values, offsets), bias)


def _nm_cpu(
    x: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, n: int, m: int, bias: torch.Tensor | None
) -> torch.Tensor:
    return cpu.linear(x, nm.to_bitmask(_nm_weight(x, values, positions, n, m)), bias)


def _bitmask_cuda(
    x: torch.Tensor, mask: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return _on_gpu(x, _bitmask_weight(x, mask, values, offsets), bias)


def _nm_cuda(
    x: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, n: int, m: int, bias: torch.Tensor | None
) -> torch.Tensor:
    return _on_gpu(x, _nm_weight(x, values, positions, n, m), bias)


def _on_gpu(x: torch.Tensor, weight: FloatWeight, bias: torch.Tensor | None) -> torch.Tensor:
    # Triton is imported only where there is a GPU: a CPU installation may lack it.
    from sparsedeploy_vllm import triton_kernels, tuning

    return triton_kernels.linear(x, prepare(weight), bias, tuning.config_for(weight, x.shape[0]))


for _name, _cpu, _cuda in (
    ("bitmask_linear", _bitmask_cpu, _bitmask_cuda),
    ("nm_linear", _nm_cpu, _nm_cuda),
):
    _LIBRARY.impl(_name, _cpu, "CPU")
    _LIBRARY.impl(_name, _cuda, "CUDA")


@torch.library.register_fake("sparsedeploy::bitmask_linear")
def _bitmask_fake(
    x: torch.Tensor, mask: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(x.shape[0], mask.shape[0])


@torch.library.register_fake("sparsedeploy::nm_linear")
def _nm_fake(
    x: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, n: int, m: int, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(x.shape[0], values.shape[0])
