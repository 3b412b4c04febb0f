"""Packed checkpoints in transformers: ``from_pretrained`` reads them, ``save_pretrained`` writes them again.

Linears stay packed in memory; :mod:`.product` multiplies them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsedeploy.errors import UserError
from sparsedeploy.formats import packed as packing
from sparsedeploy.formats import product
from sparsedeploy.formats.config import METHOD, ModuleFormat, PackedConfig
from sparsedeploy.formats.packed import PackedWeight
from sparsedeploy.formats.product import Prepared


class PackedLinear(nn.Module):
    """A linear ``[..., in_features] -> [..., out_features]`` whose weight stays packed."""

    def __init__(self, name: str, entry: ModuleFormat, bias: bool, dtype: torch.dtype, device: Any = "meta") -> None:
        super().__init__()
        self.name = name
        self.entry = entry
        self.in_features = entry.columns
        self.out_features = entry.rows
        for part, (shape, kind) in _layout(entry, dtype).items():
            self.register_buffer(part, torch.empty(shape, dtype=kind, device=device))
        self.bias = nn.Parameter(torch.empty(entry.rows, dtype=dtype, device=device), False) if bias else None
        self.ready: Prepared | None = None

    def packed(self) -> PackedWeight:
        """The packed weight, checked.

        Raises:
            UserError: its tensors disagree.
        """
        return packing.from_tensors(self.name, self.entry, dict(self.named_buffers()))

    def prepare(self, *, keep: bool = True) -> None:
        """Bring the weight into the form that its device multiplies; the first product does it otherwise.

        Args:
            keep: whether the stored tensors stay too, which saving and moving the module need.
        """
        if self.ready is None:
            self.ready = product.prepare(packing.assemble(self.entry, dict(self.named_buffers())))
        if not keep:
            for part in packing.tensor_layout(self.entry):
                setattr(self, part, torch.empty(0, dtype=getattr(self, part).dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.ready is None:
            self.prepare()
        assert self.ready is not None
        return product.multiply(x, self.ready, self.bias)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        # The module moves to another device or dtype.
        self.ready = None
        return super()._apply(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.ready = None
        super()._load_from_state_dict(*arguments, **options)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.entry.kind}"


@register_quantization_config(METHOD)
class PackedQuantizationConfig(QuantizationConfigMixin):
    """``quantization_config`` as transformers wants it; :class:`PackedConfig` does the work."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = METHOD
        self.packed = PackedConfig.from_dict({"quant_method": METHOD, **values})

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **unused: Any) -> Any:
        result = cls(**config_dict)
        return (result, unused) if return_unused_kwargs else result

    def to_dict(self) -> dict[str, Any]:
        return self.packed.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts :class:`PackedLinear` in place of the packed linears before tensors are loaded, and checks them after."""

    requires_calibration = True
    is_trainable = False

    def is_serializable(self, **_: Any) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        config: PackedConfig = self.quantization_config.packed
        found = set()
        for name, module in list(model.named_modules()):
            key = config.find(name)
            if key is None:
                continue
            entry = config.modules[key]
            shape = tuple(getattr(module, "weight", torch.empty(0)).shape)
            if not isinstance(module, nn.Linear) or shape != (entry.rows, entry.columns):
                raise UserError(
                    f"{name} is packed as a linear of {entry.rows} x {entry.columns}, the model has "
                    f"{type(module).__name__} {shape} there",
                    "Export the checkpoint again.",
                )
            replacement = PackedLinear(name, entry, module.bias is not None, module.weight.dtype)
            model.set_submodule(name, replacement)
            found.add(key)
        if missing := [name for name in config.modules if name not in found]:
            raise UserError(f"the model has no module {missing[0]}, which is packed", "Export the checkpoint again.")

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.packed()
        return model

    def _dequantize(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                weight = packing.unpack(module.packed())
                if module.entry.bits is not None:
                    weight = weight.to(next(model.parameters()).dtype)
                linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
                linear.weight = nn.Parameter(weight, requires_grad=False)
                if module.bias is not None:
                    linear.bias = module.bias
                model.set_submodule(name, linear)
        return model


def _layout(entry: ModuleFormat, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {
        part: (shape, dtype if kind is None else kind) for part, (shape, kind) in packing.tensor_layout(entry).items()
    }
