"""Masks by whole forward passes: what Wanda's definition says, by none of the product's means.

For each layer in turn: hooks on its linears, transformers' own forward pass of the whole model over one sequence after
the other, scores |W| * sqrt(sum over tokens of x^2), a stable sort of each row, and the pruned weights in place before
the next layer's turn (Sun et al. 2024, algorithm 1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def layers_of(names: Iterable[str]) -> dict[int, list[str]]:
    """The module names of each layer, by the first number in them."""
    layers: dict[int, list[str]] = {}
    for name in names:
        found = re.search(r"\.(\d+)\.", name)
        assert found, name
        layers.setdefault(int(found[1]), []).append(name)
    return layers


class Weight:
    """One prunable weight ``[out, in]`` by the product's name: a linear, a transposed one, or a slice of experts."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name, self.expert = name, -1
        try:
            self.module, self.parameter = model.get_submodule(name), "weight"
        except AttributeError:
            path, expert, self.parameter = name.rsplit(".", 2)
            self.module, self.expert = model.get_submodule(path), int(expert)

    @property
    def value(self) -> torch.Tensor:
        whole = self.module._parameters[self.parameter]
        if hasattr(self.module, "moe_num_experts"):  # DBRX stacks its experts in rows
            rows = whole.view(self.module.moe_num_experts, -1, whole.shape[1])[self.expert]
            return rows.T if self.parameter == "w2" else rows
        if self.expert >= 0:
            return whole[self.expert].T if _is_transposed(self.module) else whole[self.expert]
        return whole.T if isinstance(self.module, Conv1D) else whole


@torch.no_grad()
def wanda_masks(
    model: nn.Module, names: Iterable[str], tokens: torch.Tensor, sparsity: float
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Prune the named linears of a model in place.

    Args:
        tokens: int64 ``[sequences, length]``.

    Returns:
        Masks, True where kept, and the scores in float64, by name.
    """
    masks, scores = {}, {}
    for members in layers_of(names).values():
        weights = [Weight(model, name) for name in members]
        with sums_of_squares(weights) as sums:
            for row in tokens:
                model(input_ids=row[None], use_cache=False)
        for weight in weights:
            value, name = weight.value, weight.name
            # What no token reaches counts by magnitude.
            scores[name] = value.double().abs() * sums.get(name, torch.ones(value.shape[1]).double()).sqrt()
            masks[name] = torch.ones_like(scores[name], dtype=torch.bool)
            drop = scores[name].argsort(dim=1, stable=True)[:, : round(sparsity * value.shape[1])]
            masks[name].scatter_(1, drop, False)
            value.masked_fill_(~masks[name], 0)
    return masks, scores


@contextmanager
def sums_of_squares(weights: Iterable[Weight]) -> Iterator[dict[str, torch.Tensor]]:
    """Sums over tokens of the squared inputs of weights, float64 ``[columns]`` by name; not of what was not reached."""
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        if x.numel():
            sums[name] = sums.get(name, 0) + x.double().reshape(-1, x.shape[-1]).square().sum(dim=0)

    def linear(name: str) -> Callable[..., None]:
        return lambda module, args: add(name, args[0])

    def experts(of: list[Weight]) -> Callable[..., None]:
        """The tokens that were chosen for an expert enter its first weights; what those make of them, the last one."""

        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
            hidden, *chosen = (*args, *kwargs.values())[:2]
            if of[0].parameter in ("w1", "v1", "w2"):  # one expert's tokens, and its rows of each tensor
                first, up = args[1:3]
                expert = first.storage_offset() // first.numel()
                inner = module.activation_fn(hidden @ first.T) * (hidden @ up.T)
                for weight in of:
                    if weight.expert == expert:
                        add(weight.name, inner if weight.parameter == "w2" else hidden)
                return
            if of[0].parameter == "weight":  # the tokens come sorted by expert, with how many each expert has
                parts = hidden.split(torch.as_tensor(chosen[0]).tolist())
                for weight in of:
                    add(weight.name, parts[weight.expert])
                return
            hidden = hidden.reshape(-1, hidden.shape[-1])
            for weight in of:
                if chosen:
                    x = hidden[(chosen[0].reshape(len(hidden), -1) == weight.expert).any(dim=1)]
                else:  # the tokens come as one block for each expert
                    x = hidden.reshape(module.num_experts, -1, hidden.shape[-1])[weight.expert]
                add(weight.name, x if weight.parameter != "down_proj" else _inner(module, x, weight.expert))

        return hook

    handles = []
    fused: dict[nn.Module, list[Weight]] = {}
    for weight in weights:
        if weight.expert >= 0:
            fused.setdefault(weight.module, []).append(weight)
        else:
            handles.append(weight.module.register_forward_pre_hook(linear(weight.name)))
    handles += [module.register_forward_pre_hook(experts(of), with_kwargs=True) for module, of in fused.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _is_transposed(module: nn.Module) -> bool:
    """Whether experts keep ``[experts, in, out]``; Llama 4's and Aria's do and do not say so."""
    silent = ("Llama4TextExperts", "AriaGroupedExpertsGemm")
    return getattr(module, "is_transposed", type(module).__name__ in silent)


def _inner(module: nn.Module, x: torch.Tensor, expert: int) -> torch.Tensor:
    """What enters an expert's last weight, by the definition of its class."""
    name = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
    whole = getattr(module, name)[expert]
    first = x @ (whole if _is_transposed(module) else whole.T)
    if (bias := getattr(module, f"{name}_bias", None)) is not None:
        first = first + bias[expert]
    if name == "up_proj":
        return module.act_fn(first)
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(first)
    gate, up = first.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def differences(
    masks: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], scores: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Modules whose masks differ, with the largest relative distance of a wrongly placed score from its row's border.

    A distance at the rounding of float32 is a tie that two orders of one sum decide differently; anything above it is
    another function.
    """
    wrong = {}
    for name, mask in masks.items():
        rows = (mask != expected[name]).any(dim=1).nonzero().flatten()
        if len(rows):
            score, kept = scores[name][rows], expected[name][rows]
            border = score.masked_fill(~kept, torch.inf).min(dim=1, keepdim=True).values
            distance = ((score - border).abs() / border).masked_fill(mask[rows] == kept, 0)
            wrong[name] = float(distance.max())
    return wrong
