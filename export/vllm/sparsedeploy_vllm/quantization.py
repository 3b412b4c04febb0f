"""vLLM's side: the quantisation method ``sparsedeploy`` and its linear method.

A checkpoint's packed tensors do not have the shape of the layer's weight, and merged layers (``qkv_proj``,
``gate_up_proj``) get several of them. So the layer starts with empty parameters whose loaders collect the tensors of
each part (``parts.py``); when loading ends, parts of one format are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from sparsedeploy.errors import UserError
from sparsedeploy.formats import nm
from sparsedeploy.formats import packed as packing
from sparsedeploy.formats.config import METHOD, ModuleFormat, PackedConfig
from sparsedeploy.formats.nm import NMWeight
from sparsedeploy.formats.packed import PackedWeight
from sparsedeploy.formats.product import Prepared, multiply, prepare
from sparsedeploy.formats.quantized import QuantizedWeight
from sparsedeploy_vllm import choice
from sparsedeploy_vllm.parts import Part, loader, share_of_rank

logger = init_logger("vllm.plugins.sparsedeploy")

_PARTS = ("weight", "weight_mask", "weight_values", "weight_offsets", "weight_positions", "weight_scales")
_ANOTHER_SIZE = "Choose a tensor-parallel size that divides it into whole groups of 64 columns (128 with such scales)."


@register_quantization_config(METHOD)
class SparseDeployConfig(QuantizationConfig):
    """The checkpoint's ``quantization_config``."""

    def __init__(self, packed: PackedConfig) -> None:
        super().__init__()
        self.packed = packed

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SparseDeployConfig:
        return cls(PackedConfig.from_dict(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claims nothing; refuses a damaged or newer configuration while vLLM reads the model's, before it starts."""
        if hf_quant_cfg.get("quant_method") == METHOD:
            PackedConfig.from_dict(hf_quant_cfg)
        return None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        renamed = hf_to_vllm_mapper.apply_dict(dict(self.packed.modules))
        self.packed = PackedConfig(renamed, tuple(hf_to_vllm_mapper.apply_list(list(self.packed.ignore))))

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        entries = self._entries(prefix)
        if not any(entries):
            return UnquantizedLinearMethod()
        return PackedLinearMethod(prefix, entries)

    def _entries(self, prefix: str) -> list[ModuleFormat | None]:
        """The formats of a layer's parts in the checkpoint: its own, or those of the modules that it merges."""
        key = self.packed.find(prefix)
        if key is not None:
            return [self.packed.modules[key]]
        parent, _, name = prefix.rpartition(".")
        members = self.packed_modules_mapping.get(name, [])
        keys = [self.packed.find(f"{parent}.{member}") for member in members]
        return [None if key is None else self.packed.modules[key] for key in keys]


@dataclass(frozen=True)
class _Segment:
    """Consecutive rows of the finished layer in one format; its tensors are the layer's parameters.

    Attributes:
        suffix: of the parameters' names.
        weight: None for dense rows.
    """

    suffix: str
    weight: Prepared | None

    def tensors(self, dense: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """What the layer keeps for it, by the parameters' names."""
        if self.weight is None:
            assert dense is not None
            return {f"weight{self.suffix}": dense}
        return {f"packed_{name}{self.suffix}": tensor for name, tensor in self.weight.tensors().items()}

    def product(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.weight is None:
            return functional.linear(x, getattr(layer, f"weight{self.suffix}"), bias)
        names = self.weight.tensors()
        tensors = {name: getattr(layer, f"packed_{name}{self.suffix}") for name in names}
        return multiply(x, self.weight.with_tensors(tensors), bias)


class PackedLinearMethod(LinearMethodBase):
    """Loads, cuts, joins and multiplies packed weights.

    Args:
        entries: formats of the layer's parts in the checkpoint; None where one is dense.
    """

    def __init__(self, prefix: str, entries: list[ModuleFormat | None]) -> None:
        self.prefix = prefix
        self.entries = entries

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        ranks = share_of_rank(layer, len(output_partition_sizes))
        shares = list(zip(output_partition_sizes, ranks, strict=True))
        fused = len(self.entries) == 1
        if not fused and len(self.entries) != len(shares):
            raise UserError(
                f"{self.prefix} merges {len(shares)} weights, the checkpoint has {len(self.entries)} for it",
                "Export the checkpoint again, or use the vLLM version that the plugin was made for.",
            )
        layer.packed_parts = [
            Part(self.prefix, entry, shares if fused else [shares[index]]) for index, entry in enumerate(self.entries)
        ]
        layer.packed_columns = (input_size_per_partition, input_size)
        layer.packed_dtype = params_dtype
        self._check_sizes(layer, output_size)
        for part in _PARTS:
            empty = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            layer.register_parameter(part, empty)
            set_weight_attrs(empty, {"weight_loader": loader(layer, part)})

    def _check_sizes(self, layer: Any, output_size: int) -> None:
        """Refuse, before anything is read, sizes that do not fit or that this tensor-parallel size cannot cut."""
        mine, every = layer.packed_columns
        rows = sum(part.entry.rows for part in layer.packed_parts if part.entry is not None)
        complete = all(part.entry is not None for part in layer.packed_parts)
        # Key and value heads that are repeated on several ranks count several times in vLLM's size.
        if complete and rows > output_size:
            raise UserError(
                f"{self.prefix} has {output_size} rows, the checkpoint {rows}", "Export the checkpoint again."
            )
        for part in layer.packed_parts:
            if part.entry is None:
                continue
            if part.entry.columns != every:
                raise UserError(
                    f"{self.prefix} has {every} columns, the checkpoint {part.entry.columns}",
                    "Export the checkpoint again.",
                )
            if mine != every and not packing.can_cut_columns(part.entry, mine):
                raise UserError(
                    f"{self.prefix}: {every // mine} ranks would get {mine} of {every} columns each, "
                    f"which cannot be cut from {part.entry.kind} weights",
                    _ANOTHER_SIZE,
                )

    def process_weights_after_loading(self, layer: Any) -> None:
        weights: list[PackedWeight | torch.Tensor] = []
        for part in layer.packed_parts:
            if not part.weights:
                missing = "weight" if part.entry is None else next(iter(packing.tensor_layout(part.entry)))
                raise UserError(f"{self.prefix}: the checkpoint lacks its {missing}", "Export the checkpoint again.")
            weights.extend(part.weights)
        del layer.packed_parts
        for part in _PARTS:
            delattr(layer, part)
        joined = _join(weights)
        dtype = layer.packed_dtype
        if all(_is_cpu(weight) for weight in joined):
            joined = [self._choose(weight, dtype) for weight in joined]
            if all(isinstance(weight, torch.Tensor) for weight in joined):
                self._become_dense(layer, [weight for weight in joined if isinstance(weight, torch.Tensor)])
                return
        segments = []
        for index, weight in enumerate(joined):
            dense = weight if isinstance(weight, torch.Tensor) else None
            ready = None if isinstance(weight, torch.Tensor) else prepare(weight)
            segment = _Segment("" if index == 0 else f"_{index}", ready)
            for name, tensor in segment.tensors(dense).items():
                layer.register_parameter(name, nn.Parameter(tensor.contiguous(), requires_grad=False))
            segments.append(segment)
        layer.packed_segments = tuple(segments)
        self._tune(segments, dtype)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        segments = layer.packed_segments
        if len(segments) == 1:
            return segments[0].product(layer, x, bias)
        out = torch.cat([segment.product(layer, x, None) for segment in segments], dim=-1)
        return out if bias is None else out + bias

    def _choose(self, weight: PackedWeight | torch.Tensor, dtype: torch.dtype) -> PackedWeight | torch.Tensor:
        if isinstance(weight, torch.Tensor):
            return weight
        decision = choice.choose(weight, dtype, _vllm_dense)
        sparsity = 1 - weight.count / (weight.rows * weight.columns)
        logger.info_once(
            "%d x %d at %.0f %% sparsity runs %s (%s)",
            weight.rows,
            weight.columns,
            round(sparsity * 100, -1),
            "packed" if decision.packed else "dense",
            decision.reason,
        )
        return weight if decision.packed else packing.unpack(weight).to(dtype)

    def _tune(self, segments: list[_Segment], dtype: torch.dtype) -> None:
        ready = [segment.weight for segment in segments if segment.weight is not None]
        if all(tensor.device.type == "cpu" for weight in ready for tensor in weight.tensors().values()):
            return
        # Triton is imported only where there is a GPU: a CPU installation may lack it.
        from sparsedeploy_vllm import gpu, tuning

        for weight in ready:
            if isinstance(weight, gpu.GpuWeight):
                tuning.tune(weight, dtype)

    def _become_dense(self, layer: Any, weights: list[torch.Tensor]) -> None:
        """Hand the layer over to vLLM's own dense method."""
        layer.register_parameter("weight", nn.Parameter(torch.cat(weights), requires_grad=False))
        layer.quant_method = UnquantizedLinearMethod()
        layer.quant_method.process_weights_after_loading(layer)


def _vllm_dense(weight: torch.Tensor) -> choice.Product:
    """vLLM's own dense product for this platform, which is faster than torch's on many processors."""
    layer = nn.Module()
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    method = UnquantizedLinearMethod()
    method.process_weights_after_loading(layer)
    return lambda x: method.apply(layer, x)


def _join(weights: Sequence[PackedWeight | torch.Tensor]) -> list[PackedWeight | torch.Tensor]:
    """Join neighbours of one format; CPU kernels read mask bits, so that N:M can join them there."""
    groups: list[list[Any]] = []
    for weight in weights:
        ready = _as_bitmask(weight) if _is_cpu(weight) else weight
        if groups and _alike(groups[-1][-1], ready):
            groups[-1].append(ready)
        else:
            groups.append([ready])
    return [
        torch.cat(group)
        if isinstance(group[0], torch.Tensor)
        else packing.join_rows(group)
        if len(group) > 1
        else group[0]
        for group in groups
    ]


def _as_bitmask(weight: PackedWeight | torch.Tensor) -> PackedWeight | torch.Tensor:
    if isinstance(weight, QuantizedWeight) and isinstance(weight.codes, NMWeight):
        return replace(weight, codes=nm.to_bitmask(weight.codes))
    return nm.to_bitmask(weight) if isinstance(weight, NMWeight) else weight


def _alike(first: PackedWeight | torch.Tensor, second: PackedWeight | torch.Tensor) -> bool:
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        return isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
    return packing.can_join(first, second)


def _is_cpu(weight: PackedWeight | torch.Tensor) -> bool:
    tensor = weight if isinstance(weight, torch.Tensor) else weight.values
    return tensor.device.type == "cpu"
