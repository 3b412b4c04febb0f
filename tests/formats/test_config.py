"""``quantization_config``: round trip and refusals."""

from __future__ import annotations

from typing import Any

import pytest

from sparsedeploy.errors import UserError
from sparsedeploy.formats.config import ModuleFormat, PackedConfig

GOOD = PackedConfig(
    modules={
        "model.layers.0.q_proj": ModuleFormat("2:8", 32, 64, 512),
        "model.k_proj": ModuleFormat("bitmask", 8, 9, 3),
    },
    ignore=("lm_head",),
)


def test_round_trip() -> None:
    assert PackedConfig.from_dict(GOOD.to_dict()) == GOOD


def test_find_ignores_a_missing_first_part() -> None:
    assert GOOD.find("model.k_proj") == GOOD.find("base.model.k_proj") == "model.k_proj"
    assert GOOD.find("k_proj") is None


def module_with(**changes: Any) -> dict[str, Any]:
    values = GOOD.to_dict()
    values["modules"]["model.layers.0.q_proj"].update(changes)
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**GOOD.to_dict(), "format_version": 2}, "format version 2"),
        ({**GOOD.to_dict(), "quant_method": "gptq"}, "gptq"),
        ({**GOOD.to_dict(), "ignore": ["model.k_proj"]}, "both packs and ignores"),
        ({key: value for key, value in GOOD.to_dict().items() if key != "modules"}, "malformed"),
        (module_with(values=511), "511 values do not fit"),
        (module_with(format="2:16"), "2:16"),
        (module_with(format="dense"), "not known"),
        (module_with(shape=[32, 60]), "whole groups"),
        (module_with(shape=[32]), "malformed"),
        (module_with(shape=[-1, 64]), "shape is -1"),
        (module_with(values="many"), "values is 'many'"),
    ],
)
def test_bad_configurations_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PackedConfig.from_dict(values)
