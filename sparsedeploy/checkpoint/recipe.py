"""``recipe.yaml``: the plan in llm-compressor's recipe format, one modifier per mask structure.

Wanda and SparseGPT take one list of rates in module order, so a whole unstructured plan is one modifier. Several
patterns need a modifier each; with ``oneshot(..., pipeline="sequential")`` they share one calibration pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from sparsedeploy.plan import NM, ModuleTarget, SparsityPlan, layer_number
from sparsedeploy.registry import PRUNERS

_HEADER = """\
# This checkpoint's plan for llm-compressor:
#   llmcompressor.oneshot(model, dataset=..., recipe="recipe.yaml", pipeline="sequential")
# mask_structure counts what is pruned: 2:8 kept is 6:8 here. Modules that lose nothing are left out.
"""
_HEAD = """\
# The output head, which was pruned too, is not in this recipe: llm-compressor prunes decoder layers.
"""
_LACKS = """\
# llm-compressor has no modifier for the pruning method '{method}': no recipe replays this checkpoint.
# sparsity.json beside this file holds its plan, sparsity.masks its masks.
"""


@dataclass(frozen=True)
class Modifier:
    """llm-compressor's modifier for a pruning method; the trait ``llmcompressor`` of a pruner.

    Attributes:
        name: the modifier's class.
        arguments: the pruner's options -> arguments of the modifier.
        rounds_up: it prunes ``floor(weights * rate) + 1`` of each block of an unstructured module.
        by_tensor: it takes one rate, and targets are tensors instead of modules.
        note: for readers of the recipe.
        unusable: why ``oneshot`` cannot replay it; empty where it can.
    """

    name: str
    arguments: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda options: {}
    rounds_up: bool = False
    by_tensor: bool = False
    note: str = ""
    unusable: str = ""


def modifier_for(method: str) -> Modifier | None:
    """The modifier of a pruning method; None where llm-compressor has none, or the method is not installed."""
    modifier: Modifier | None = None
    if method in PRUNERS.names():
        modifier = PRUNERS.get(method).traits.get("llmcompressor")
    return modifier


def recipe_yaml(plan: SparsityPlan, method: str, options: dict[str, Any]) -> str:
    """The recipe text for ``llmcompressor.oneshot``.

    Args:
        method: the pruner; for one that llm-compressor lacks the text says so and has no recipe.
        options: of the pruner.
    """
    modifier = modifier_for(method)
    if modifier is None:
        return _LACKS.format(method=method)
    by_structure: dict[NM | None, list[ModuleTarget]] = {}
    for target in plan.targets:
        if target.zeros_per_row and layer_number(target.name) is not None:
            by_structure.setdefault(target.pattern, []).append(target)
    parts: list[dict[str, Any]] = []
    for pattern, targets in by_structure.items():
        groups = _by_rate(targets) if modifier.by_tensor else [targets]
        parts.extend(_arguments(modifier, pattern, group, options) for group in groups)
    names = ["sparsity_modifiers"] if len(parts) == 1 else [f"group{index}_modifiers" for index in range(len(parts))]
    stage = {name: {modifier.name: arguments} for name, arguments in zip(names, parts, strict=True)}
    note = modifier.note + (_HEAD if plan.has_head else "")
    return _HEADER + note + yaml.safe_dump({"sparsity_stage": stage}, sort_keys=False, width=110)


def _arguments(
    modifier: Modifier, pattern: NM | None, targets: list[ModuleTarget], options: dict[str, Any]
) -> dict[str, Any]:
    names = [f"re:^{re.escape(target.name)}$" for target in targets]
    structure = f"{pattern.m - pattern.n}:{pattern.m}" if pattern else "0:0"
    if modifier.by_tensor:
        rate = _floor_safe_rate(targets[0])
        return {
            "init_sparsity": rate,
            "final_sparsity": rate,
            "mask_structure": structure if pattern else "unstructured",
            "targets": [f"{name[:-1]}.weight$" for name in names],
        }
    rate_of = _one_less_rate if modifier.rounds_up and pattern is None else _floor_safe_rate
    rates = [rate_of(target) for target in targets]
    return {
        "sparsity": rates[0] if len(set(rates)) == 1 else rates,
        "mask_structure": structure,
        "targets": names,
        **modifier.arguments(options),
    }


def _by_rate(targets: list[ModuleTarget]) -> list[list[ModuleTarget]]:
    groups: dict[float, list[ModuleTarget]] = {}
    for target in targets:
        groups.setdefault(_floor_safe_rate(target), []).append(target)
    return list(groups.values())


def _floor_safe_rate(target: ModuleTarget) -> float:
    """The rate for which ``int(columns * rate)``, llm-compressor's count, is the plan's."""
    rate = target.zeros_per_row / target.columns
    while int(target.columns * rate) < target.zeros_per_row:
        rate = math.nextafter(rate, 1.0)
    return rate


def _one_less_rate(target: ModuleTarget) -> float:
    """The rate for which ``int(size * rate) + 1``, llm-compressor's SparseGPT count in a block of ``size`` weights, is
    the plan's share of the block rounded up.

    The step below the plan's rate moves the product of a block's weights (a million or so) by more than its rounding
    error and by less than the smallest fraction that a share can have, one in ``columns``.
    """
    return target.zeros_per_row / target.columns - 1e-12
