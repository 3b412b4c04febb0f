"""``recipe.yaml``: the plan in llm-compressor's recipe format, one modifier per mask structure.

Wanda and SparseGPT take one list of rates in module order, so a whole unstructured plan is one modifier. Several
patterns need a modifier each; with ``oneshot(..., pipeline="sequential")`` they share one calibration pass.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from sparsedeploy.plan import NM, ModuleTarget, SparsityPlan

MODIFIERS = {
    "wanda": "WandaPruningModifier",
    "sparsegpt": "SparseGPTModifier",
    "magnitude": "MagnitudePruningModifier",
}
_HEADER = """\
# This checkpoint's plan for llm-compressor:
#   llmcompressor.oneshot(model, dataset=..., recipe="recipe.yaml", pipeline="sequential")
# mask_structure counts what is pruned: 2:8 kept is 6:8 here. Modules that lose nothing are left out.
"""
_SPARSEGPT_NOTE = """\
# SparseGPTModifier prunes floor(weights of a block * sparsity) + 1 weights of each block of columns, so the rates are
# just below the plan's: a block loses the plan's share, rounded up to a whole weight.
"""
_MAGNITUDE_NOTE = """\
# oneshot of llm-compressor 0.14 makes magnitude masks but never applies them; they need its training loop.
"""


def recipe_yaml(plan: SparsityPlan, method: str, options: dict[str, Any]) -> str:
    """The recipe text for ``llmcompressor.oneshot``.

    Args:
        method: the pruner; one that llm-compressor lacks is written as SparseGPT.
        options: of the pruner; SparseGPT's block and damping are carried over.
    """
    modifier = MODIFIERS.get(method, MODIFIERS["sparsegpt"])
    by_structure: dict[NM | None, list[ModuleTarget]] = {}
    for target in plan.targets:
        if target.zeros_per_row:
            by_structure.setdefault(target.pattern, []).append(target)
    parts: list[dict[str, Any]] = []
    for pattern, targets in by_structure.items():
        groups = _by_rate(targets) if modifier == MODIFIERS["magnitude"] else [targets]
        parts.extend(_arguments(modifier, pattern, group, options) for group in groups)
    names = ["sparsity_modifiers"] if len(parts) == 1 else [f"group{index}_modifiers" for index in range(len(parts))]
    stage = {name: {modifier: arguments} for name, arguments in zip(names, parts, strict=True)}
    note = {MODIFIERS["sparsegpt"]: _SPARSEGPT_NOTE, MODIFIERS["magnitude"]: _MAGNITUDE_NOTE}.get(modifier, "")
    return _HEADER + note + yaml.safe_dump({"sparsity_stage": stage}, sort_keys=False, width=110)


def _arguments(
    modifier: str, pattern: NM | None, targets: list[ModuleTarget], options: dict[str, Any]
) -> dict[str, Any]:
    names = [f"re:^{re.escape(target.name)}$" for target in targets]
    structure = f"{pattern.m - pattern.n}:{pattern.m}" if pattern else "0:0"
    if modifier == MODIFIERS["magnitude"]:
        rate = _floor_safe_rate(targets[0])
        return {
            "init_sparsity": rate,
            "final_sparsity": rate,
            "mask_structure": structure if pattern else "unstructured",
            "targets": [f"{name[:-1]}.weight$" for name in names],
        }
    is_sparsegpt = modifier == MODIFIERS["sparsegpt"]
    rate_of = _one_less_rate if is_sparsegpt and pattern is None else _floor_safe_rate
    rates = [rate_of(target) for target in targets]
    arguments: dict[str, Any] = {
        "sparsity": rates[0] if len(set(rates)) == 1 else rates,
        "mask_structure": structure,
        "targets": names,
    }
    if is_sparsegpt:
        arguments["block_size"] = int(options.get("block", 128))
        arguments["dampening_frac"] = float(options.get("damping", 0.01))
    return arguments


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
