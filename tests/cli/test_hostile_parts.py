"""What lies beside a model or describes work, hostile: adapters and sweeps. One clear line, or the right result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from sparsedeploy.errors import UserError
from sparsedeploy.models.loading import load_model
from sparsedeploy.workflows.sweep_file import load_sweep
from tests.cli.conftest import Outcome
from tests.cli.mutations import VALUES, damaged_bytes, mutations, unless_refused
from tests.cli.test_bad_input import refused

Cli = Callable[..., Outcome]
Tensors = dict[str, torch.Tensor]
MODULE = "model.layers.0.self_attn.q_proj"
DOWN, UP = (f"base_model.model.{MODULE}.lora_{end}.weight" for end in "AB")
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [MODULE], "bias": "none", "use_dora": False}


def factors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {DOWN: torch.randn(2, 32, generator=generator), UP: torch.randn(32, 2, generator=generator)}


def write(model: Path, config: dict[str, Any], tensors: Tensors) -> None:
    (model / "adapter").mkdir(exist_ok=True)
    (model / "adapter" / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, model / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"lora_alpha": "x"}, {}, "'lora_alpha' is a string"),
        ({"lora_alpha": None}, {}, "'lora_alpha' is null"),
        ({"lora_alpha": True}, {}, "'lora_alpha' is true or false"),
        ({"lora_alpha": float("inf")}, {}, "'lora_alpha' is not a finite number"),
        ({"lora_alpha": 10**400}, {}, "'lora_alpha' is not a finite number"),
        ({"alpha_pattern": []}, {}, "'alpha_pattern' is a list"),
        ({"alpha_pattern": {MODULE: "x"}}, {}, f"'{MODULE}' is a string"),
        ({"peft_type": "IA3"}, {}, "is not plain LoRA"),
        ({"use_dora": True}, {}, "is not plain LoRA (use_dora)"),
        ({"fan_in_fan_out": True}, {}, "is not plain LoRA (fan_in_fan_out)"),
        ({"bias": "all"}, {}, "is not plain LoRA (bias)"),
        ({"modules_to_save": ["lm_head"]}, {}, "is not plain LoRA (modules_to_save)"),
        ({}, {"base_model.model.lm_head.weight": torch.ones(2, 2)}, "(base_model.model.lm_head.weight)"),
        ({}, {DOWN.replace("lora_A", "lora_magnitude_vector"): torch.ones(32)}, "lora_magnitude_vector"),
        ({}, {"\x1b[2J\n": torch.ones(1)}, "(\\x1b[2J\\n)"),
        ({}, {DOWN: None}, f"lacks a factor of {MODULE}"),
        ({}, {UP: None}, f"lacks a factor of {MODULE}"),
        ({}, {DOWN: None, UP: None}, "holds no factors"),
        ({}, {DOWN: torch.ones(32)}, "do not belong together"),
        ({}, {DOWN: torch.ones(1, 2, 32)}, "do not belong together"),
        ({}, {DOWN: torch.ones(3, 32)}, "do not belong together"),
        ({}, {DOWN: torch.ones(0, 32), UP: torch.ones(32, 0)}, "do not belong together"),
        ({}, {DOWN: torch.ones(2, 32, dtype=torch.int64)}, "do not belong together"),
        ({}, {DOWN: torch.ones(2, 31)}, f"do not fit {MODULE}"),
        ({}, {DOWN: torch.full((2, 32), torch.nan)}, "holds NaN"),
        ({}, {name.replace("q_proj", "x_proj"): value for name, value in factors().items()}, "is not a linear"),
    ],
)
def test_an_adapter_that_would_count_in_part(
    cli: Cli, model: Path, text: Path, config: dict[str, Any], change: dict[str, torch.Tensor | None], message: str
) -> None:
    """Whatever would be left out or misread is refused; nothing is attached without a word."""
    write(model, config, {name: one for name, one in {**factors(), **change}.items() if one is not None})
    refused(cli("eval", model, "-d", text, "--context", 32), message, model.parent)


def test_damaged_adapters(model: Path) -> None:
    """What is accepted computes with all factors, times the scale that is written there."""
    write(model, {}, factors())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = model / "adapter" / name
        sound = path.read_bytes()
        damaged = damaged_bytes(sound, 30, 21)
        if name.endswith(".json"):
            damaged += mutations(sound, 60, 22)
        for content in damaged:
            path.write_bytes(content)
            if (found := unless_refused(lambda: load_model(model, dtype=torch.float32))) is None:
                continue
            query: Any = found.get_submodule(MODULE)
            if name.endswith(".json"):
                said = json.loads(content)
                scale = said.get("alpha_pattern", {}).get(MODULE, said["lora_alpha"]) / 2
                expected = factors()[UP] * scale @ factors()[DOWN]
                assert torch.allclose(query.up.weight @ query.down.weight, expected), content
            else:
                assert len(query.down.weight) == 2, content[:300]
        path.write_bytes(sound)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        sound = (model / "adapter" / name).read_bytes()
        (model / "adapter" / name).unlink()
        with pytest.raises(UserError, match=name):
            load_model(model)
        (model / "adapter" / name).write_bytes(sound)


@pytest.fixture
def spec(model: Path, text: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "rates": [0.5],
        "methods": ["magnitude"],
        "eval": {"data": str(text), "context": 32, "max_windows": 1},
    }


NAMES = ("../x", "a/b", "/tmp/x", "..", ".", ".hidden", "~", "", "a\nb", "\x1b[2J", "a\0b", "x" * 300, "a b", ["a"])


@pytest.mark.parametrize("line", ["methods", "allocations", "recoveries"])
def test_a_cell_of_a_sweep_stays_in_its_folder(line: str, spec: dict[str, Any], tmp_path: Path) -> None:
    """The name of an entry becomes a part of a folder's name."""
    key, method = {"methods": ("method", "magnitude"), "allocations": ("allocation", "uniform")}.get(
        line, ("method", "lora")
    )
    path = tmp_path / "sweep.yaml"
    for name in NAMES:
        path.write_text(yaml.safe_dump({**spec, line: [{key: method, "name": name}], "train": {"data": "x"}}))
        sweep = unless_refused(lambda: load_sweep(path))
        for cell in sweep.cells if sweep else ():
            assert (tmp_path / cell.name).resolve().parent == tmp_path.resolve(), cell.name
            assert cell.name.isascii()
            assert cell.name.isprintable()
    path.write_text(yaml.safe_dump({**spec, "methods": [{"method": "magnitude", "name": "../x"}]}))
    with pytest.raises(UserError, match=r"'\.\./x-uniform-50' cannot be a folder's name"):
        load_sweep(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": [1.5]}, "the rate 1.5 is outside [0, 1)"),
        ({"rates": [124]}, "write patterns in quotes: '2:4'"),
        ({"rates": [float("nan")]}, "rates is nan"),
        ({"rates": [10**400]}, "It takes a finite number"),
        ({"rates": [True]}, "a rate is True"),
        ({"methods": [{"method": "magnitude", "sparsity": 0.9}]}, "an entry sets sparsity"),
        ({"methods": [{"method": "magnitude", "pattern": "2:4"}]}, "an entry sets pattern"),
        ({"allocations": [{"allocation": "uniform", "sparsity": 0.9}]}, "an entry sets sparsity"),
        ({"methods": [{"method": "magnitude", "name": None}]}, "has the name none"),
        ({"methods": [None]}, "a sweep's entry is none"),
        ({"model": 3}, "model is 3. Name a model folder"),
        ({"eval": {"data": "nowhere.txt"}}, "no text at 'nowhere.txt' to evaluate on"),
        ({"eval": {"data": "/dev/zero"}}, "/dev/zero is a device"),
        ({"calibration": {"data": "nowhere.txt"}}, "no text at 'nowhere.txt' to calibrate on"),
        ({"train": {"data": "nowhere.txt"}}, "no text at 'nowhere.txt' to train on"),
        ({"recoveries": ["lora"]}, "lora trains and there is no text"),
        ({"rates": ["half"]}, "a rate is 'half'. Give numbers and patterns"),
        ({"rates": ["50%"]}, "a rate is '50%'. Give numbers and patterns"),
        ({"rates": ["nan"]}, "the rate nan is outside [0, 1)"),
        ({"rates": [0.5, 0.5]}, "names the cell magnitude-uniform-50 twice"),
        ({"rates": [0.5, "0.50"]}, "names the cell magnitude-uniform-50 twice"),
        (
            {"methods": ["magnitude", {"method": "wanda", "name": "Magnitude"}]},
            "names the cell magnitude-uniform-50 twice",
        ),
    ],
)
def test_a_sweep_is_checked_before_its_first_cell(
    changes: dict[str, Any], message: str, spec: dict[str, Any], tmp_path: Path
) -> None:
    """A cell is what its name says, and what cannot be filled is not begun."""
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**spec, **changes}))
    with pytest.raises(UserError) as caught:
        load_sweep(tmp_path / "sweep.yaml")
    assert message in str(caught.value)


SWEEPS = {
    "aliases": "rates: &a [0.5]\nmethods: *a\n",
    "a bomb": "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
    "a key twice": "rates: [0.5]\nrates: [0.6]\n",
    "a key twice, nested": "rates: [0.5]\nmethods: [{method: magnitude, method: wanda}]\n",
    "tabs": "rates:\n\t- 0.5\n",
    "digits": f"rates: [{'9' * 6000}]\n",
    "code": "rates: !!python/object/apply:os.system [id]\n",
    "two documents": "rates: [0.5]\n---\nrates: [0.6]\n",
    "levels": f"rates: {'[' * 200}{']' * 200}\n",
    "a zero byte": "rates: [0.5]\0\n",
}


@pytest.mark.parametrize("name", SWEEPS)
def test_yaml_that_is_not_read(name: str, spec: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({key: spec[key] for key in ("model", "eval")}) + SWEEPS[name])
    with pytest.raises(UserError, match="is not YAML") as caught:
        load_sweep(path)
    assert len(str(caught.value)) < 500
    assert "sys." not in str(caught.value)


def test_rates_in_quotes_are_numbers(spec: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**spec, "rates": ["0.5", " 2:4 ", 0.625]}))
    names = [cell.name for cell in load_sweep(tmp_path / "sweep.yaml").cells]
    assert names == ["dense", "magnitude-uniform-50", "magnitude-uniform-2of4", "magnitude-uniform-62.5"]


def test_lines_of_a_sweep(spec: dict[str, Any], tmp_path: Path) -> None:
    """Each value in each place is refused, or makes cells that a recipe can be written for."""
    path = tmp_path / "sweep.yaml"
    values = [value for value in VALUES if not isinstance(value, str) or value.isprintable()]
    odd = [True, 10**400, "0.5", "2:4:1", "0:4", 124, [0.5], {"a": 1}, None, -0.1, 1]
    for name in ("rates", "methods", "allocations", "recoveries", "calibration", "train", "eval", "zzz", 3):
        for value in (*values, *([each] for each in (*values, *odd))):
            path.write_text(yaml.safe_dump({**spec, name: value}))
            sweep = unless_refused(lambda: load_sweep(path))
            assert sweep is None or sweep.cells[0].name == "dense", (name, value)
    for content in damaged_bytes(yaml.safe_dump(spec).encode(), 60, 23):
        path.write_bytes(content)
        unless_refused(lambda: load_sweep(path))
