"""Loading: the tensors of a layer's parts are collected, checked, and cut to this rank's share, all of it packed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from sparsedeploy.errors import UserError
from sparsedeploy.formats import packed as packing
from sparsedeploy.formats.bitmask import BitmaskWeight
from sparsedeploy.formats.config import ModuleFormat
from sparsedeploy.formats.packed import FloatWeight, PackedWeight
from sparsedeploy.formats.quantized import QuantizedWeight

_NUMBERS = {"q": 0, "k": 1, "v": 2}


@dataclass
class Part:
    """Rows of a layer that the checkpoint stores as one module.

    Attributes:
        entry: its packed format; None for a dense member of a merged layer.
        shares: rows of it on every rank, and this rank's number, for each of the logical weights that it holds.
        collected: tensors that have been read and not been used yet.
        weights: what this rank keeps of it, one for each of its logical weights.
    """

    name: str
    entry: ModuleFormat | None
    shares: list[tuple[int, int]]
    collected: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: list[PackedWeight | torch.Tensor] = field(default_factory=list)


def loader(layer: Any, tensor_name: str) -> Any:
    """The ``weight_loader`` of one of the layer's empty parameters."""

    def load(param: nn.Parameter, loaded: torch.Tensor, shard_id: str | int | None = None) -> None:
        index = _NUMBERS[shard_id] if isinstance(shard_id, str) else shard_id or 0
        part: Part = layer.packed_parts[index]
        part.collected[tensor_name] = loaded
        wanted = ["weight"] if part.entry is None else list(packing.tensor_layout(part.entry))
        if all(name in part.collected for name in wanted):
            device = param.device
            part.weights = [_to(weight, device, layer.packed_dtype) for weight in _cut(layer, part)]
            part.collected.clear()

    return load


def _cut(layer: Any, part: Part) -> list[PackedWeight | torch.Tensor]:
    """This rank's share of a part, for each of its logical weights."""
    mine, every = layer.packed_columns
    first = layer.tp_rank * mine if isinstance(layer, RowParallelLinear) and mine != every else 0
    rows = part.collected["weight"].shape[0] if part.entry is None else part.entry.rows
    world = _repetitions(layer, part, rows)
    result: list[PackedWeight | torch.Tensor] = []
    offset = 0
    for (size, rank), ranks in zip(part.shares, world, strict=True):
        start = offset + rank * size
        offset += size * ranks
        if part.entry is None:
            result.append(part.collected["weight"][start : start + size, first : first + mine])
            continue
        packed = packing.from_tensors(part.name, part.entry, part.collected)
        if (start, size) != (0, rows):
            packed = packing.cut_rows(packed, start, start + size)
        if mine != every:
            packed = packing.cut_columns(packed, first, first + mine)
        result.append(packed)
    if offset != rows:
        raise UserError(f"{part.name} has {rows} rows, vLLM expects {offset}", "Export the checkpoint again.")
    return result


def share_of_rank(layer: Any, count: int) -> list[int]:
    """For each logical weight of a layer, which of its equal shares this rank takes."""
    if isinstance(layer, RowParallelLinear) or not hasattr(layer, "output_size_per_partition"):
        return [0] * count
    if isinstance(layer, QKVParallelLinear) and count == 3:
        repeated = layer.tp_rank // layer.num_kv_head_replicas
        return [layer.tp_rank, repeated, repeated]
    return [layer.tp_rank] * count


def _repetitions(layer: Any, part: Part, rows: int) -> list[int]:
    """Into how many shares each logical weight of a part is divided."""
    if len(part.shares) == 1:
        return [rows // part.shares[0][0]]
    if isinstance(layer, QKVParallelLinear):
        keys = max(1, layer.tp_size // layer.num_kv_head_replicas)
        return [layer.tp_size, keys, keys]
    return [layer.tp_size] * len(part.shares)


def _to(weight: PackedWeight | torch.Tensor, device: torch.device, dtype: torch.dtype) -> PackedWeight | torch.Tensor:
    """A copy on the layer's device with values of its dtype."""
    if isinstance(weight, torch.Tensor):
        return weight.to(device, dtype, copy=True)
    if isinstance(weight, QuantizedWeight):
        codes = _moved(weight.codes, device, torch.int8)
        return replace(weight, codes=codes, scales=weight.scales.to(device, copy=True))
    return _moved(weight, device, dtype)


def _moved(weight: FloatWeight, device: torch.device, dtype: torch.dtype) -> FloatWeight:
    values = weight.values.to(device, dtype, copy=True)
    if isinstance(weight, BitmaskWeight):
        mask, offsets = weight.mask.to(device, copy=True), weight.offsets.to(device, copy=True)
        return replace(weight, mask=mask, values=values, offsets=offsets)
    return replace(weight, values=values, positions=weight.positions.to(device, copy=True))
