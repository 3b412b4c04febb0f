"""Plans from files: what does not make sense is refused before anything is pruned."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sparsedeploy.errors import UserError
from sparsedeploy.plan import ModuleTarget, SparsityPlan

PLAN = SparsityPlan(
    0.5, "unstructured", "uniform", (ModuleTarget("a", 4, 8, 4), ModuleTarget("b", 4, 8, 4)), details={"x": [1]}
)


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert SparsityPlan.load(tmp_path / "plan.json") == PLAN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": math.nan}, "'sparsity' is not a finite number"),
        ({"sparsity": 1.5}, "the plan's sparsity is 1.5"),
        ({"sparsity": "0.5"}, "'sparsity' is a string, not a number"),
        ({"pattern": "2;4"}, "pattern '2;4' is not known"),
        ({"pattern": 124}, "'pattern' is a number, not a string"),
        ({"modules": []}, "the plan names no modules"),
        ({"modules": {}}, "'modules' is an object, not a list"),
        ({"modules": [3]}, "entry 0 is a number, not an object"),
        ({"format": 7}, "plan format 7 is not 1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        SparsityPlan.from_dict({**PLAN.to_dict(), **changes})
    assert message in str(error.value)


@pytest.mark.parametrize(("key", "value"), [("rows", 0), ("columns", -1), ("zeros_per_row", 2.5), ("rows", 10**30)])
def test_sizes_are_whole_numbers(key: str, value: Any) -> None:
    values = json.loads(json.dumps(PLAN.to_dict()))
    values["modules"][1][key] = value
    with pytest.raises(UserError, match=f"modules entry 1: '{key}' is"):
        SparsityPlan.from_dict(values)


def test_a_module_stands_once() -> None:
    values = PLAN.to_dict()
    values["modules"].append(values["modules"][0])
    with pytest.raises(UserError, match="the plan has a twice"):
        SparsityPlan.from_dict(values)
