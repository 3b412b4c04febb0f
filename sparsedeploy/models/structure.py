"""Find decoder layers and their linears by structure, never by model name."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsedeploy.errors import UserError
from sparsedeploy.linear_algebra import all_finite
from sparsedeploy.models.linear_views import PrunableLinear, expert_weights, is_fused_experts, prunable_linears


@dataclass(frozen=True)
class DecoderStack:
    """The decoder layers of a causal LM.

    Attributes:
        name: the module path of the list that holds them, such as ``model.layers``.
        layers: the layers in order of depth.
        head: the output head by its name, where it is pruned like one more layer behind the last; else None.
    """

    name: str
    layers: nn.ModuleList
    head: tuple[str, nn.Linear] | None = None

    def __len__(self) -> int:
        """The layers, with the output head where it counts."""
        return len(self.layers) + (self.head is not None)

    def layer_name(self, index: int) -> str:
        return self.head[0] if self.head and index == len(self.layers) else f"{self.name}.{index}"

    def module(self, index: int) -> nn.Module:
        """The layer of that index, or the head."""
        return self.head[1] if self.head and index == len(self.layers) else self.layers[index]

    def linears(self, index: int) -> dict[str, PrunableLinear]:
        """Full name -> linear, for the layer of that index, in the order of its definition."""
        if self.head and index == len(self.layers):
            return dict([self.head])
        return prunable_linears(self.layer_name(index), self.layers[index])

    def all_linears(self) -> dict[str, PrunableLinear]:
        """Every prunable linear of the model, layer by layer."""
        return {name: linear for index in range(len(self)) for name, linear in self.linears(index).items()}


def find_decoder_stack(model: nn.Module, head: bool = False) -> DecoderStack:
    """Find the list of decoder layers: the outermost list of modules that holds most linear weights.

    It is looked for in the part that transformers calls the model's decoder, so a model that also sees or hears is
    represented by its language model. The layers may be of several classes.

    Args:
        head: whether the output head is pruned, too.

    Raises:
        UserError: there is none, its layers keep most of their weights outside ``nn.Linear``, or share them; or a
            head that cannot be pruned (:func:`output_head`).
    """
    name, layers = _largest_list(model, language_model(model)) or _largest_list(model, model) or ("", None)
    if layers is None:
        raise UserError(
            f"{type(model).__name__} has no list of decoder layers made of linears",
            "Use a decoder-only transformer such as Llama, Qwen, Mistral, OPT or Gemma.",
        )
    size = _linear_parameters(layers)
    matrices = sum(p.numel() for p in layers.parameters() if p.dim() >= 2)
    if size < 0.5 * matrices:
        raise UserError(
            f"the layers of {type(model).__name__} keep {1 - size / matrices:.0%} of their weights outside linears",
            "Such modules cannot be pruned; use a model made of linear projections.",
        )
    matrices_of = (
        (f"{name}.{at}", [id(p) for p in layer.parameters() if p.dim() >= 2]) for at, layer in enumerate(layers)
    )
    check_not_shared(model, matrices_of)
    return DecoderStack(name, layers, output_head(model) if head else None)


def output_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """The linear that gives the logits, by its name.

    Raises:
        UserError: there is none, or it is tied to the embedding.
    """
    kind, fix = type(model).__name__, "Leave out --lm-head."
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    name = next((name for name, module in model.named_modules() if module is head), None)
    if not isinstance(head, nn.Linear) or name is None:
        raise UserError(f"{kind} has no output head that is a linear", fix)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if getattr(embedding, "weight", None) is head.weight or f"{name}.weight" in tied:
        raise UserError(
            f"the output head {name} of {kind} is tied to the embedding, which would be pruned with it",
            f"{fix[:-1]}; or give the model a head of its own (tie_word_embeddings: false and {name}.weight).",
        )
    return name, head


def language_model(model: nn.Module) -> nn.Module:
    """The part of a model that reads text: of one that also sees or hears, its language model; else the whole."""
    get = getattr(model, "get_decoder", None)
    part = get() if callable(get) else None
    return part if isinstance(part, nn.Module) else model


def _largest_list(model: nn.Module, part: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The outermost list of layers in a part of the model that holds most linear weights, by its name in the model.

    A tower that takes pixels or sound, as transformers' models say of themselves, is passed over.
    """
    inside = {id(module) for module in part.modules()}
    for tower in part.modules():
        if tower is not part and getattr(tower, "main_input_name", "input_ids") != "input_ids":
            inside -= {id(module) for module in tower.modules()}
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or id(module) not in inside:
            continue
        size = _linear_parameters(module)
        # Strictly larger: an outer list is met before the lists inside it, and keeps its place on equal size.
        if size > 0 and (best is None or size > best[0]):
            best = (size, name, module)
    return None if best is None else best[1:]


def check_alone(model: nn.Module, stack: DecoderStack) -> None:
    """Refuse layers that are halves of layers, or one of several stacks: pruning them alone would leave out the rest.

    XLM keeps its attentions in one list and its feed-forward parts in another; HRM runs two stacks in turn.

    Raises:
        UserError: naming the two lists.
    """
    name, layers = stack.name, stack.layers
    others = {id(module) for module in language_model(model).modules()} - {id(module) for module in layers.modules()}
    size, parent = _linear_parameters(layers), name.rpartition(".")[0]
    for other, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or id(module) not in others or name.startswith(f"{other}."):
            continue
        halves = other.rpartition(".")[0] == parent and _linear_parameters(module) > size / 4
        same = {type(layer) for layer in module} & {type(layer) for layer in layers}
        if len(module) == len(layers) and (halves or same):
            kind = "the parts of its layers" if halves else "its layers"
            raise UserError(
                f"{type(model).__name__} keeps {kind} in two lists ({name} and {other}), so it cannot be pruned layer "
                "by layer",
                "Use a model with one list of decoder layers, such as Llama, Qwen, Mistral, OPT or Gemma.",
            )


def check_not_shared(model: nn.Module, layers: Iterable[tuple[str, Iterable[Hashable]]]) -> None:
    """Refuse layers that share weights: they cannot be pruned one after the other.

    Args:
        layers: the name of each layer, with what identifies its matrices.

    Raises:
        UserError: naming the first two such layers.
    """
    owners: dict[Hashable, str] = {}
    for name, weights in layers:
        for weight in weights:
            if owners.setdefault(weight, name) != name:
                raise UserError(
                    f"{name} of {type(model).__name__} shares weights with {owners[weight]}, so they cannot be pruned "
                    "one after the other",
                    "Use a model whose layers have weights of their own.",
                )


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
            size += sum(p.numel() for p in expert_weights(inner).values())
    return size
