"""Find decoder layers and their linears by structure, never by model name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsedeploy.errors import UserError
from sparsedeploy.linear_algebra import all_finite
from sparsedeploy.models.linear_views import PrunableLinear, is_fused_experts, prunable_linears


@dataclass(frozen=True)
class DecoderStack:
    """The decoder layers of a causal LM.

    Attributes:
        name: the module path of the list that holds them, such as ``model.layers``.
        layers: the layers in order of depth.
    """

    name: str
    layers: nn.ModuleList

    def layer_name(self, index: int) -> str:
        return f"{self.name}.{index}"

    def linears(self, index: int) -> dict[str, PrunableLinear]:
        """Full name -> linear, for the layer of that index, in the order of its definition."""
        return prunable_linears(self.layer_name(index), self.layers[index])

    def all_linears(self) -> dict[str, PrunableLinear]:
        """Every prunable linear of the model, layer by layer."""
        return {name: linear for index in range(len(self.layers)) for name, linear in self.linears(index).items()}


def find_decoder_stack(model: nn.Module) -> DecoderStack:
    """Find the list of decoder layers: the outermost list of same-class modules that holds most linear weights.

    Raises:
        UserError: there is none, or its layers keep most of their weights outside ``nn.Linear``.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if len({type(layer) for layer in module}) != 1:
            continue
        size = _linear_parameters(module)
        # Strictly larger: an outer list is met before the lists inside it, and keeps its place on equal size.
        if size > 0 and (best is None or size > best[0]):
            best = (size, name, module)
    if best is None:
        raise UserError(
            f"{type(model).__name__} has no list of decoder layers made of linears",
            "Use a decoder-only transformer such as Llama, Qwen, Mistral, OPT or Gemma.",
        )
    size, name, layers = best
    matrices = sum(p.numel() for p in layers.parameters() if p.dim() >= 2)
    if size < 0.5 * matrices:
        raise UserError(
            f"the layers of {type(model).__name__} keep {1 - size / matrices:.0%} of their weights outside linears",
            "Such modules cannot be pruned; use a model made of linear projections.",
        )
    return DecoderStack(name, layers)


def check_finite(name: str, weight: torch.Tensor) -> None:
    """Refuse a weight with NaN or infinity.

    Raises:
        UserError: naming the module.
    """
    if not all_finite(weight):
        raise UserError(f"{name}.weight holds NaN or infinite values", "Get an intact copy of the checkpoint.")


def plain_linears(linears: Mapping[str, PrunableLinear], purpose: str) -> dict[str, nn.Linear]:
    """The same linears, where all are modules of their own.

    Raises:
        UserError: transposed weights or slices of fused experts, which ``purpose`` cannot use.
    """
    plain = {name: linear for name, linear in linears.items() if isinstance(linear, nn.Linear)}
    if other := next((name for name in linears if name not in plain), None):
        raise UserError(
            f"{purpose} needs linears of their own, and {other} is part of a fused or transposed weight",
            "Use a model whose layers are made of nn.Linear.",
        )
    return plain


def _linear_parameters(module: nn.Module) -> int:
    size = 0
    for inner in module.modules():
        if isinstance(inner, nn.Linear | Conv1D):
            size += inner.weight.numel()
        elif is_fused_experts(inner):
            size += sum(p.numel() for p in inner.parameters(recurse=False) if p.dim() == 3)
    return size
