"""The recipe asks llm-compressor for exactly the plan's counts."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sparsedeploy.checkpoint.recipe import modifier_for, recipe_yaml
from sparsedeploy.plan import NM, ModuleTarget, SparsityPlan

# The pruners' modules are imported before hypothesis measures how long an example takes.
MODIFIERS = {method: modifier_for(method) for method in ("wanda", "sparsegpt")}


def plan_of(*targets: ModuleTarget) -> SparsityPlan:
    return SparsityPlan(sparsity=0.5, pattern="unstructured", allocation="uniform", targets=targets)


def modifiers(plan: SparsityPlan, method: str, **options: object) -> list[tuple[str, dict]]:
    stage = yaml.safe_load(recipe_yaml(plan, method, options))["sparsity_stage"]
    return [item for group in stage.values() for item in group.items()]


@given(columns=st.integers(1, 30_000), share=st.floats(0, 1, exclude_min=True))
def test_wanda_rate_gives_the_count_of_a_row(columns: int, share: float) -> None:
    zeros = max(1, round(columns * share))
    ((_, arguments),) = modifiers(plan_of(ModuleTarget("layers.0.m", 4, columns, zeros)), "wanda")
    assert int(columns * arguments["sparsity"]) == zeros


@given(
    rows=st.integers(1, 20_000),
    columns=st.integers(1, 20_000),
    share=st.floats(0, 1, exclude_min=True),
    block=st.just(128),
)
def test_sparsegpt_rate_gives_the_share_of_a_block(rows: int, columns: int, share: float, block: int) -> None:
    zeros = max(1, round(columns * share))
    ((_, arguments),) = modifiers(plan_of(ModuleTarget("layers.0.m", rows, columns, zeros)), "sparsegpt", block=block)
    for width in {min(block, columns), columns % block or min(block, columns)}:
        size = rows * width
        assert int(size * arguments["sparsity"]) + 1 == -(-size * zeros // columns)


@pytest.mark.parametrize(("rows", "columns"), [(19_997, 19_993), (4096, 11_003), (28_672, 8191)])
def test_sparsegpt_rate_rounds_the_smallest_fraction_up(rows: int, columns: int) -> None:
    zeros = pow(rows * 128, -1, columns)  # a block's share is a whole number and one in ``columns``
    ((_, arguments),) = modifiers(plan_of(ModuleTarget("layers.0.m", rows, columns, zeros)), "sparsegpt")
    assert int(rows * 128 * arguments["sparsity"]) + 1 == rows * 128 * zeros // columns + 1


def test_a_method_that_llm_compressor_lacks_has_no_recipe() -> None:
    text = recipe_yaml(plan_of(ModuleTarget("layers.0.a", 8, 16, 4)), "nosuch", {})
    assert yaml.safe_load(text) is None
    assert "llm-compressor has no modifier for the pruning method 'nosuch'" in text


def test_an_unstructured_plan_is_one_modifier_with_rates_in_module_order() -> None:
    targets = [ModuleTarget(f"layers.{i}.a", 8, 16, zeros) for i, zeros in enumerate((4, 8, 12))]
    ((name, arguments),) = modifiers(plan_of(*targets), "wanda")
    assert name == "WandaPruningModifier"
    assert arguments["sparsity"] == [0.25, 0.5, 0.75]
    assert arguments["targets"] == [rf"re:^layers\.{i}\.a$" for i in range(3)]


def test_each_pattern_is_a_modifier_that_counts_what_is_pruned() -> None:
    targets = [
        ModuleTarget("layers.0.a", 8, 16, 4, NM(6, 8)),
        ModuleTarget("layers.0.b", 8, 16, 12, NM(2, 8)),
        ModuleTarget("layers.0.c", 8, 16, 4, NM(6, 8)),
    ]
    found = modifiers(plan_of(*targets), "sparsegpt", block=64, damping=0.1)
    assert [arguments["mask_structure"] for _, arguments in found] == ["2:8", "6:8"]
    assert [arguments["targets"] for _, arguments in found] == [
        [r"re:^layers\.0\.a$", r"re:^layers\.0\.c$"],
        [r"re:^layers\.0\.b$"],
    ]
    assert {(arguments["block_size"], arguments["dampening_frac"]) for _, arguments in found} == {(64, 0.1)}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_module_that_loses_nothing_is_left_out(method: str) -> None:
    ((_, arguments),) = modifiers(
        plan_of(ModuleTarget("layers.0.a", 8, 16, 0), ModuleTarget("layers.0.b", 8, 16, 4)), method
    )
    assert arguments["targets"] == [r"re:^layers\.0\.b$"]
