"""Linears that are not an ``nn.Linear``: transposed weights (Conv1D of GPT-2) and the slices of fused expert tensors.

Every prunable weight is seen as ``[out_features, in_features]``, wherever the model keeps it; pruners and allocators
never learn the difference.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from sparsedeploy.errors import UserError

# The products by which experts are computed; the weight is the second operand.
_PRODUCTS = {
    F.linear,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.Tensor.mm,
    torch.Tensor.bmm,
}
# The names that transformers gives the fused tensors of experts ``[experts, ...]``.
_EXPERT_WEIGHTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
# Those of DBRX, ``[experts * width, hidden]``, and whether an expert's rows are ``[in_features, out_features]``.
_STACKED_WEIGHTS = {"w1": False, "v1": False, "w2": True}


@dataclass(frozen=True, eq=False)
class LinearView:
    """A weight seen as ``[out_features, in_features]``.

    Attributes:
        module: where the parameter is kept.
        parameter: its name there.
        expert: which slice ``parameter[expert]``; None for the whole parameter.
        transposed: whether the parameter is kept as ``[in_features, out_features]``.
        stacked: of how many experts a parameter ``[experts * rows, columns]`` keeps the rows; 0 for other forms.
    """

    module: nn.Module
    parameter: str
    expert: int | None
    transposed: bool
    stacked: int = 0

    @property
    def weight(self) -> torch.Tensor:
        """A view of the parameter: changing it changes the model."""
        whole = self.module._parameters[self.parameter]
        assert whole is not None
        weight = whole.detach()
        if self.stacked:
            weight = weight.view(self.stacked, -1, weight.shape[1])
        weight = weight if self.expert is None else weight[self.expert]
        return weight.T if self.transposed else weight

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])


# What a decoder layer's prunable weights are, by full name.
PrunableLinear = nn.Linear | LinearView


def assign_weight(linear: PrunableLinear, weight: torch.Tensor) -> None:
    """Give a linear a new weight ``[out_features, in_features]`` of the same type.

    That of an ``nn.Linear`` is not copied: the old one is freed at once.
    """
    if isinstance(linear, nn.Linear):
        linear.weight.data = weight
    else:
        linear.weight.copy_(weight)


def prunable_linears(prefix: str, layer: nn.Module) -> dict[str, PrunableLinear]:
    """The prunable weights of a decoder layer by full name, in the order of definition.

    A slice of a fused expert tensor is named after its expert: ``mlp.experts.3.down_proj``. A linear that its module
    never calls is left out (:func:`uncalled_linears`).

    Raises:
        UserError: experts that keep their weights in an unknown form.
    """
    found: dict[str, PrunableLinear] = {}
    uncalled = uncalled_linears(layer)
    for name, module in layer.named_modules():
        path = f"{prefix}.{name}" if name else prefix
        if name in uncalled:
            continue
        if isinstance(module, nn.Linear):
            found[path] = module
        elif isinstance(module, Conv1D):
            found[path] = LinearView(module, "weight", None, True)
        elif is_fused_experts(module):
            found.update(_expert_slices(path, module))
    return found


def uncalled_linears(layer: nn.Module) -> set[str]:
    """Linears whose weight their module reads and multiplies by itself, such as ``dt_proj`` of Mamba, by name.

    What enters them cannot be measured, so they stay dense.
    """
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in layer.named_modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Linear) and name in _weights_read(type(module))  # type: ignore[arg-type]
    }


@cache
def _weights_read(kind: type) -> frozenset[str]:
    """The attributes of a class whose ``weight`` its code multiplies by, or reads without ever calling them."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return frozenset()
    read = set(re.findall(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size)\b)", source))
    multiplied = set(re.findall(r"\bself\.(\w+)\.weight @", source))
    return frozenset(multiplied | (read - set(re.findall(r"\bself\.(\w+)\(", source))))


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module keeps the weights of several experts in one tensor each, see :func:`expert_weights`."""
    tensors = expert_weights(module)
    if not tensors or _stacked_experts(module):
        return bool(tensors)
    # Experts that hand on their input may be counted with the others, and have no last weight.
    count = len(tensors.get("down_proj", next(iter(tensors.values()))))
    named = {getattr(module, name, None) for name in ("num_experts", "num_routed_experts", "groups")}
    return count > 1 and count in named and not isinstance(module, nn.Conv1d)


def expert_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of several experts in a module: ``[experts, ...]``, or stacked in their rows as DBRX does it."""
    dimensions = 2 if _stacked_experts(module) else 3
    return {name: tensor for name, tensor in module.named_parameters(recurse=False) if tensor.dim() == dimensions}


def _stacked_experts(module: nn.Module) -> int:
    """How many experts a module of DBRX's form stacks in the rows of its tensors; 0 for other modules."""
    experts, width = getattr(module, "moe_num_experts", 0), getattr(module, "ffn_hidden_size", 0)
    tensors = dict(module.named_parameters(recurse=False))
    if tensors.keys() != _STACKED_WEIGHTS.keys() or any(len(one) != experts * width for one in tensors.values()):
        return 0
    return int(experts)


def watchable_experts(model: nn.Module) -> None:
    """Let fused experts compute one after the other, by products that :func:`watch_inputs` can see."""
    if any(is_fused_experts(module) for module in model.modules()) and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # type: ignore[operator]


def _expert_slices(path: str, module: nn.Module) -> dict[str, LinearView]:
    weights = expert_weights(module)
    if stacked := _stacked_experts(module):
        return {
            f"{path}.{expert}.{name}": LinearView(module, name, expert, transposed, stacked)
            for expert in range(stacked)
            for name, transposed in _STACKED_WEIGHTS.items()
        }
    said = _said_transposed(module)
    if unknown := sorted(weights.keys() - set(_EXPERT_WEIGHTS) - ({"weight"} if said is not None else set())):
        raise UserError(
            f"the experts of {path} keep weights in {unknown[0]}, an unknown form",
            "Use a model whose experts have gate_up_proj and down_proj.",
        )
    transposed = _is_transposed(path, module, weights) if said is None else said
    return {
        f"{path}.{expert}.{name}": LinearView(module, name, expert, transposed)
        for expert in range(min(map(len, weights.values())))
        for name in weights
    }


def _said_transposed(module: nn.Module) -> bool | None:
    """Whether experts of one product each keep ``weight [experts, in, out]``, by the sizes that they name; or neither.

    JetMoE's have ``output_size`` and ``input_size``, Aria's ``in_features`` and ``out_features``.
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 3:
        return None
    for names, transposed in ((("output_size", "input_size"), False), (("in_features", "out_features"), True)):
        if tuple(weight.shape[1:]) == tuple(getattr(module, name, None) for name in names):
            return transposed
    return None


def _is_transposed(path: str, module: nn.Module, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether the experts' tensors are ``[experts, in, out]``, as the module says or as the shapes show."""
    said = getattr(module, "is_transposed", None)
    if said is not None:
        return bool(said)
    first, last = (name for name in (next(n for n in weights if n != "down_proj"), "down_proj"))
    # What leaves the first product, gated or not, enters the last one; the outer dimension is the hidden size.
    shapes = weights[first].shape[1:], weights[last].shape[1:]
    plain = shapes[0][1] == shapes[1][0] and shapes[0][0] in (shapes[1][1], 2 * shapes[1][1])
    turned = shapes[0][0] == shapes[1][1] and shapes[0][1] in (shapes[1][0], 2 * shapes[1][0])
    if plain == turned:
        raise UserError(
            f"it is unclear whether the experts of {path} are stored transposed", "Use another model family."
        )
    return turned


@contextmanager
def watch_inputs(linears: Mapping[str, PrunableLinear], watch: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call ``watch(name, inputs)`` whenever one of the linears is about to be applied, ``inputs [..., in_features]``.

    Slices of experts have no module to hook: the products of torch are watched for operands that lie in their tensors.
    """
    views = {name: linear for name, linear in linears.items() if isinstance(linear, LinearView)}
    slices = {name: view for name, view in views.items() if view.expert is not None}
    hooked = {name: views[name].module if name in views else linear for name, linear in linears.items()}

    def hook(name: str) -> Any:
        return lambda module, args: watch(name, args[0])

    handles = [
        module.register_forward_pre_hook(hook(name))  # type: ignore[union-attr]
        for name, module in hooked.items()
        if name not in slices
    ]
    try:
        if slices:
            with _ExpertProducts(slices, watch):
                yield
        else:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _ExpertProducts(TorchFunctionMode):
    """Recognises products whose weight operand is a slice of, or a whole, fused expert tensor."""

    def __init__(self, slices: Mapping[str, LinearView], watch: Callable[[str, torch.Tensor], None]) -> None:
        super().__init__()
        self._watch = watch
        self._names: dict[tuple[int, int], str] = {}
        for name, view in slices.items():
            whole = view.module._parameters[view.parameter]
            assert whole is not None
            assert view.expert is not None
            rows = len(whole) // view.stacked if view.stacked else 1
            offset = int(whole.storage_offset()) + view.expert * rows * whole.stride(0)
            self._names[whole.untyped_storage().data_ptr(), offset] = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and len(args) >= 2 and isinstance(args[1], torch.Tensor):
            inputs, weight = args[0], args[1]
            if weight.dim() == 3:  # all experts at once: [experts, tokens, in] @ [experts, in, out]
                for expert in range(len(weight)):
                    self._tell(weight[expert], inputs[expert])
            else:
                self._tell(weight, inputs)
        return func(*args, **(kwargs or {}))

    def _tell(self, weight: torch.Tensor, inputs: torch.Tensor) -> None:
        name = self._names.get((weight.untyped_storage().data_ptr(), int(weight.storage_offset())))
        if name is not None:
            self._watch(name, inputs)
