"""Find decoder layers and their linears by structure, never by model name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sparsedeploy.errors import UserError
from sparsedeploy.linear_algebra import all_finite


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

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Full module name -> linear, for the layer of that index, in the order of its definition."""
        prefix = self.layer_name(index)
        return {
            f"{prefix}.{name}": module
            for name, module in self.layers[index].named_modules()
            if isinstance(module, nn.Linear)
        }

    def all_linears(self) -> dict[str, nn.Linear]:
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
            f"{type(model).__name__} has no list of decoder layers made of nn.Linear",
            "Use a decoder-only transformer such as Llama, Qwen, Mistral, OPT or Gemma.",
        )
    size, name, layers = best
    matrices = sum(p.numel() for p in layers.parameters() if p.dim() >= 2)
    if size < 0.5 * matrices:
        raise UserError(
            f"the layers of {type(model).__name__} keep {1 - size / matrices:.0%} of their weights outside nn.Linear",
            "Such modules (fused experts, Conv1D) cannot be pruned yet; use a model with linear projections.",
        )
    return DecoderStack(name, layers)


def check_finite(name: str, weight: torch.Tensor) -> None:
    """Refuse a weight with NaN or infinity.

    Raises:
        UserError: naming the module.
    """
    if not all_finite(weight):
        raise UserError(f"{name}.weight holds NaN or infinite values", "Get a sound copy of the checkpoint.")


def _linear_parameters(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
