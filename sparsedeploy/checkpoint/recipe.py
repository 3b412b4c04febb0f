"""``recipe.yaml``: the plan in llm-compressor's recipe format, one modifier per mask structure."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from sparsedeploy.plan import NM, ModuleTarget, SparsityPlan

_MODIFIERS = {
    "wanda": "WandaPruningModifier",
    "sparsegpt": "SparseGPTModifier",
    "magnitude": "MagnitudePruningModifier",
}


def recipe_yaml(plan: SparsityPlan, method: str, options: dict[str, Any]) -> str:
    """The recipe text for ``llmcompressor.oneshot``.

    Wanda and SparseGPT take one list of rates in module order, so a whole unstructured plan costs one calibration
    pass. llm-compressor's N:M **prunes** N of every M: our 2:8 is its 6:8. Its magnitude modifier takes one rate each.
    """
    modifier = _MODIFIERS.get(method, _MODIFIERS["sparsegpt"])
    by_structure: dict[NM | None, list[ModuleTarget]] = {}
    for target in plan.targets:
        by_structure.setdefault(target.pattern, []).append(target)
    stage: dict[str, Any] = {}
    for pattern, targets in by_structure.items():
        groups = _by_rate(targets) if modifier == "MagnitudePruningModifier" else [targets]
        for group in groups:
            name = f"group{len(stage)}_modifiers" if len(by_structure) > 1 or len(groups) > 1 else "sparsity_modifiers"
            stage[name] = {modifier: _arguments(modifier, pattern, group, options)}
    header = (
        "# Replays this checkpoint's plan with llm-compressor: llmcompressor.oneshot(model, dataset, recipe=...)\n"
        "# mask_structure counts what is pruned: 2:8 kept is 6:8 here.\n"
    )
    return header + yaml.safe_dump({"sparsity_stage": stage}, sort_keys=False, width=110)


def _arguments(
    modifier: str, pattern: NM | None, targets: list[ModuleTarget], options: dict[str, Any]
) -> dict[str, Any]:
    names = [f"re:^{re.escape(target.name)}$" for target in targets]
    structure = f"{pattern.m - pattern.n}:{pattern.m}" if pattern else "0:0"
    if modifier == "MagnitudePruningModifier":
        rate = _floor_safe_rate(targets[0])
        return {
            "init_sparsity": rate,
            "final_sparsity": rate,
            "mask_structure": structure if pattern else "unstructured",
            "targets": [f"{name[:-1]}.weight$" if name.endswith("$") else name for name in names],
        }
    rates = [_floor_safe_rate(target) for target in targets]
    arguments: dict[str, Any] = {
        "sparsity": rates[0] if len(set(rates)) == 1 else rates,
        "mask_structure": structure,
        "targets": names,
    }
    if modifier == "SparseGPTModifier":
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
