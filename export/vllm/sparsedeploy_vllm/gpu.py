"""Packed products on a GPU: the form in which a weight lies there, and the start of the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch.nn import functional

from sparsedeploy.formats import nm
from sparsedeploy.formats.bitmask import BitmaskWeight
from sparsedeploy.formats.packed import PackedWeight
from sparsedeploy.formats.quantized import QuantizedWeight
from sparsedeploy.plan import NM
from sparsedeploy_vllm import triton_kernels as kernels

_LIBRARY = torch.library.Library("sparsedeploy", "FRAGMENT")
_LIBRARY.define(
    "gpu_linear(Tensor x, Tensor values, Tensor places, Tensor? offsets, Tensor? scales, int n, int m, int group, "
    "Tensor? bias) -> Tensor"
)

# Triton's interpreter, which is how the kernels are tested without a GPU, multiplies no bfloat16 tiles.
INTERPRETED = triton.knobs.runtime.interpret
LARGEST_VECTOR_BATCH = 4
LARGEST_TENSOR_BATCH = 64
_WORD_BYTES = 4


@dataclass(frozen=True)
class GpuWeight:
    """A packed weight ``[rows, columns]`` as the kernels read it.

    Attributes:
        pattern: N:M, whose groups store positions; None for a bitmask.
        values: floating-point values; int8 codes, or uint8 with two int4 codes each. Codes of a bitmask are padded to
            whole words of 32 bits and two words more, which the kernels may read.
        places: the mask or the positions, uint8 ``[rows, bytes]``.
        offsets: int32 ``[rows + 1]``; None for N:M.
        scales: float16 ``[rows, ceil(columns / group)]``; None for floating-point values.
        group: columns that share a scale; 0 without scales.
    """

    rows: int
    columns: int
    pattern: NM | None
    values: torch.Tensor
    places: torch.Tensor
    offsets: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    group: int = 0

    @property
    def bits(self) -> int:
        """8 or 4 for codes; 0 for floating-point values."""
        if self.scales is None:
            return 0
        return 8 if self.values.dtype == torch.int8 else 4

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the kernels read, by name."""
        every = {name: getattr(self, name) for name in ("values", "places", "offsets", "scales")}
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> GpuWeight:
        """The same weight that reads these instead."""
        offsets, scales = tensors.get("offsets"), tensors.get("scales")
        return replace(self, values=tensors["values"], places=tensors["places"], offsets=offsets, scales=scales)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [batch, columns]`` times the weight, plus a bias ``[rows]``: ``[batch, rows]``."""
        n, m = (0, 0) if self.pattern is None else (self.pattern.n, self.pattern.m)
        tensors = (self.values, self.places, self.offsets, self.scales)
        out: torch.Tensor = torch.ops.sparsedeploy.gpu_linear(x, *tensors, n, m, self.group, bias)
        return out


@dataclass(frozen=True)
class Config:
    """How a product is run.

    Attributes:
        kernel: ``vector`` or ``tensor``.
        rows: weight rows of a program.
        columns: weight columns of a step.
        warps: warps of a program.
        stages: loads that the compiler keeps in flight.
    """

    kernel: str
    rows: int
    columns: int
    warps: int
    stages: int = 2


def prepare(weight: PackedWeight) -> GpuWeight:
    """Bring a weight into the kernels' form, on its device.

    N:M whose groups are stored as mask bits becomes a bitmask, of the same size.
    """
    codes = weight.codes if isinstance(weight, QuantizedWeight) else weight
    if not isinstance(codes, BitmaskWeight) and not nm.stores_positions(codes.pattern):
        bitmask = nm.to_bitmask(codes)
        return prepare(
            QuantizedWeight(bitmask, weight.scales, weight.bits, weight.group)
            if isinstance(weight, QuantizedWeight)
            else bitmask
        )
    values = weight.tensors()["weight_values"]
    scales, group = (weight.scales, weight.group) if isinstance(weight, QuantizedWeight) else (None, 0)
    if isinstance(codes, BitmaskWeight):
        if scales is not None:
            values = functional.pad(values, (0, -values.numel() % _WORD_BYTES + 2 * _WORD_BYTES))
        return GpuWeight(codes.rows, codes.columns, None, values, codes.mask, codes.offsets, scales, group)
    return GpuWeight(codes.rows, codes.columns, codes.pattern, values, codes.positions, None, scales, group)


def linear(x: torch.Tensor, weight: GpuWeight, bias: torch.Tensor | None, config: Config | None) -> torch.Tensor:
    """``x [batch, columns]`` times the packed weight: ``[batch, rows]``, summed in float32.

    Args:
        config: None unpacks the weight and multiplies densely.
    """
    if config is None:
        return functional.linear(x, unpack(weight, x.dtype), bias)
    x = x.contiguous()
    out = torch.empty(x.shape[0], weight.rows, dtype=x.dtype, device=x.device)
    tensors = (x, *_tensors(weight), out if bias is None else bias, out)
    vector = config.kernel == "vector"
    sizes = (*(() if vector else (len(x),)), *_sizes(weight))
    kernel = {
        (True, True): kernels._bitmask_vector,
        (True, False): kernels._bitmask_tensor,
        (False, True): kernels._nm_vector,
        (False, False): kernels._nm_tensor,
    }[weight.pattern is None, vector]
    kernel[_grid(weight, config.rows)](*tensors, *sizes, **_tile(weight, config), **_options(x, bias, config))
    return out


def unpack(weight: GpuWeight, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight ``[rows, columns]`` on its device, rounded to ``dtype`` where it has scales."""
    out = torch.empty(weight.rows, weight.columns, dtype=dtype, device=weight.values.device)
    config = Config("unpack", 4, 512, 4)
    kernel = kernels._bitmask_unpack if weight.pattern is None else kernels._nm_unpack
    tile = _tile(weight, config)
    kernel[_grid(weight, config.rows)](*_tensors(weight), out, *_sizes(weight), **tile, num_warps=config.warps)
    return out


def _tensors(weight: GpuWeight) -> tuple[torch.Tensor, ...]:
    # The kernels do not read what a weight lacks, but they take a pointer.
    scales = weight.values if weight.scales is None else weight.scales
    if weight.offsets is not None:
        values = weight.values if weight.scales is None else weight.values.view(torch.int32)
        return (weight.places, values, scales, weight.offsets)
    return (weight.values, scales, weight.places)


def _sizes(weight: GpuWeight) -> tuple[int, ...]:
    groups = () if weight.pattern is None else (weight.columns // weight.pattern.m,)
    return (weight.rows, weight.columns, *groups, weight.places.shape[1])


def _grid(weight: GpuWeight, rows: int) -> tuple[int]:
    return (triton.cdiv(weight.rows, rows),)


def _tile(weight: GpuWeight, config: Config) -> dict[str, int]:
    """What the format's kernels are compiled for."""
    # A group of at least one column keeps unused code free of a division by zero.
    tile = {"ROWS": config.rows, "BITS": weight.bits, "GROUP": weight.group or 1}
    if weight.pattern is None:
        return {"BYTES": config.columns // 8, **tile}
    n, m = weight.pattern.n, weight.pattern.m
    return {"GROUPS": config.columns // m, "FIELD": nm.code_bits(weight.pattern), "N": n, "M": m, **tile}


def _options(x: torch.Tensor, bias: torch.Tensor | None, config: Config) -> dict[str, Any]:
    """What every product is compiled for."""
    options = {"HAS_BIAS": bias is not None, "num_warps": config.warps, "num_stages": config.stages}
    if config.kernel == "vector":
        return {"BATCH": len(x), **options}
    # The smallest tile of the tensor cores has 16 rows.
    batch = max(16, triton.next_power_of_2(len(x)))
    return {"BATCH": batch, "WIDEN": INTERPRETED and x.dtype == torch.bfloat16, **options}


def _gpu_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    offsets: torch.Tensor | None,
    scales: torch.Tensor | None,
    n: int,
    m: int,
    group: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    # Imported here: the table's module imports this one.
    from sparsedeploy_vllm import tuning

    columns = x.shape[1]
    width = -(-columns // 8) if m == 0 else -(-(columns // m) * nm.code_bits(NM(n, m)) // 8)
    if places.shape[1] != width or (scales is None and x.dtype != values.dtype):
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} does not fit a packed weight of {values.dtype} with {places.shape[1]} "
            "bytes of places in a row"
        )
    pattern = None if m == 0 else NM(n, m)
    weight = GpuWeight(places.shape[0], columns, pattern, values, places, offsets, scales, group)
    return linear(x, weight, bias, tuning.config_for(weight, x.shape[0], x.dtype))


_LIBRARY.impl("gpu_linear", _gpu_linear, "CUDA")
if INTERPRETED:
    _LIBRARY.impl("gpu_linear", _gpu_linear, "CPU")


@torch.library.register_fake("sparsedeploy::gpu_linear")
def _gpu_linear_fake(x: torch.Tensor, values: torch.Tensor, places: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], places.shape[0])
