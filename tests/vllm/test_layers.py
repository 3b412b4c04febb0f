"""The plugin's layers apart from vLLM, which is not installed for the tests: stand-ins for the few names it takes.

Shows that packed tensors of every format are cut to a rank's share, joined and multiplied. It shows nothing about vLLM
itself: test_plugin.py does, where vLLM is installed.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparsedeploy.errors import UserError
from sparsedeploy.formats import bitmask, kernel_library, nm, quantized
from sparsedeploy.formats import packed as packing
from sparsedeploy.formats.config import METHOD, PackedConfig
from sparsedeploy.formats.packed import PackedWeight
from sparsedeploy.plan import NM
from tests.formats.test_packing import nm_weight, sparse_weight
from tests.formats.test_quantized import random_codes, random_scales

COLUMNS = 128


class _Layer(nn.Module):
    """What vLLM's parallel linears say about themselves."""

    def __init__(self, rank: int, ranks: int, heads_repeated: int = 1) -> None:
        super().__init__()
        self.tp_rank, self.tp_size, self.num_kv_head_replicas = rank, ranks, heads_repeated
        self.output_size_per_partition = 0


class _Unquantized:
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return functional.linear(x, layer.weight, bias)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The plugin's modules, imported beside the stand-ins, and packed wherever a layer may choose."""
    linear = {name: type(name, (_Layer,), {}) for name in ("LinearBase", "QKVParallelLinear", "RowParallelLinear")}
    nothing: dict[str, Any] = {"LinearMethodBase": object, "UnquantizedLinearMethod": _Unquantized}
    logger = logging.getLogger("stand-in")
    logger.info_once = logger.info  # type: ignore[attr-defined]

    def set_attributes(tensor: torch.Tensor, values: dict[str, Any]) -> None:
        vars(tensor).update(values)

    layers = "vllm.model_executor.layers"
    modules: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.logger": {"init_logger": lambda name: logger},
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.linear": {**linear, **nothing},
        f"{layers}.quantization": {"register_quantization_config": lambda name: lambda kind: kind},
        f"{layers}.quantization.base_config": {"QuantizationConfig": object, "QuantizeMethodBase": object},
        "vllm.model_executor.utils": {"set_weight_attrs": set_attributes},
    }
    for name, values in modules.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("SPARSEDEPLOY_CPU", "packed")
    ours = ("sparsedeploy_vllm.parts", "sparsedeploy_vllm.quantization")
    for name in ours:
        sys.modules.pop(name, None)
    yield SimpleNamespace(quantization=importlib.import_module(ours[1]), **linear)
    for name in ours:
        sys.modules.pop(name, None)


def weights(rows: int) -> list[PackedWeight]:
    """One weight of a height in every format."""
    result: list[PackedWeight] = [
        bitmask.pack(sparse_weight(rows, COLUMNS, 0.6, torch.float32)),
        nm.pack(nm_weight(rows, COLUMNS, NM(2, 8), torch.float32), NM(2, 8)),
    ]
    for bits in (8, 4):
        codes, scales = random_codes(rows, COLUMNS, 0.5, bits), random_scales(rows, COLUMNS, 32)
        result.append(quantized.pack(codes, scales, bits, 32))
    return result


def load(plugin: SimpleNamespace, layer: Any, parts: list[Any], sizes: list[int], columns: int) -> Any:
    """Go through a layer's life: empty parameters, tensors in the order of the file, the end of loading."""
    entries = [None if isinstance(part, torch.Tensor) else packing.describe(part) for part in parts]
    method = plugin.quantization.PackedLinearMethod("layer", entries)
    every = sum(part.shape[0] if isinstance(part, torch.Tensor) else part.rows for part in parts)
    method.create_weights(layer, columns, sizes, COLUMNS, every, torch.float32)
    shards: list[Any] = [None] if len(parts) == 1 else ["q", "k", "v"] if len(parts) == 3 else list(range(len(parts)))
    for shard, part in zip(shards, parts, strict=True):
        tensors = {"weight": part} if isinstance(part, torch.Tensor) else part.tensors()
        for name, tensor in tensors.items():
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, shard)
    layer.quant_method = method
    method.process_weights_after_loading(layer)
    return layer.quant_method


def near(found: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> bool:
    """Within what 8-bit activations allow."""
    allowed = x.abs().amax() / 127 * dense.abs().sum(dim=1) + 1e-4
    return bool(((found - x @ dense.T).abs() <= allowed).all())


def dense_of(part: Any) -> torch.Tensor:
    return part if isinstance(part, torch.Tensor) else packing.unpack(part)


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_merged_weights_and_their_shares(
    plugin: SimpleNamespace, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q, k and v of one format, and of three; on one rank and on both of two, with and without the CPU kernels."""
    if kernels == "off":
        monkeypatch.setattr(kernel_library, "load", lambda: None)
    queries, keys = weights(32), weights(16)
    x = torch.randn(3, COLUMNS)
    mixed = [queries[0], keys[3], dense_of(keys[1]).contiguous()]
    for parts in ([queries[i], keys[i], keys[i]] for i in range(4)), [mixed]:
        for case in parts:
            for ranks in (1, 2):
                for rank in range(ranks):
                    layer = plugin.QKVParallelLinear(rank, ranks)
                    sizes = [32 // ranks, 16 // ranks, 16 // ranks]
                    method = load(plugin, layer, list(case), sizes, COLUMNS)
                    shares = [dense_of(part).chunk(ranks)[rank] for part in case]
                    bias = torch.randn(64 // ranks)
                    found = method.apply(layer, x, bias) - bias
                    assert near(found, x, torch.cat(shares))
                    # One format, one product.
                    assert len(layer.packed_segments) == (1 if case is not mixed else 3)


def test_columns_of_a_rank(plugin: SimpleNamespace) -> None:
    x = torch.randn(3, COLUMNS)
    for weight in weights(24):
        for rank in range(2):
            layer = plugin.RowParallelLinear(rank, 2)
            method = load(plugin, layer, [weight], [24], COLUMNS // 2)
            mine = slice(rank * 64, rank * 64 + 64)
            assert near(method.apply(layer, x[:, mine]), x[:, mine], packing.unpack(weight)[:, mine])


def test_a_cut_inside_a_group_is_refused(plugin: SimpleNamespace) -> None:
    weight = quantized.pack(random_codes(8, COLUMNS, 0.5, 8), random_scales(8, COLUMNS, 128), 8, 128)
    with pytest.raises(UserError, match="2 ranks would get 64 of 128 columns each"):
        load(plugin, plugin.RowParallelLinear(0, 2), [weight], [8], COLUMNS // 2)


def test_dense_where_it_is_wanted(plugin: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes become a dense weight of the layer's dtype, and vLLM's own method takes over."""
    monkeypatch.setenv("SPARSEDEPLOY_CPU", "dense")
    weight = weights(24)[3]
    layer = plugin.QKVParallelLinear(0, 1)
    method = load(plugin, layer, [weight], [24], COLUMNS)
    assert isinstance(method, _Unquantized)
    assert torch.equal(layer.weight, packing.unpack(weight))


def test_configuration(plugin: SimpleNamespace) -> None:
    modules = {f"model.layers.0.{i}": packing.describe(weight) for i, weight in enumerate(weights(8))}
    values = PackedConfig(modules).to_dict()
    config = plugin.quantization.SparseDeployConfig
    assert config.from_config(values).packed.modules == modules
    assert config.override_quantization_method(values, None) is None
    with pytest.raises(UserError, match="format version 2"):
        config.override_quantization_method({**values, "format_version": 2}, None)
    assert config.from_config(values).get_name() == METHOD
