"""The commands, and recipes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsedeploy.errors import UserError
from sparsedeploy.workflows.recipes import load_recipe, parse_recipe, recipe_names
from tests.cli.conftest import Outcome

RECIPE = """
prune: {sparsity: 0.5, method: magnitude}
calibration: {sequences: 2, length: 32}
recover: {method: losa, options: {steps: 2, first_rank: 2}, training: {learning_rate: 1.0e-2}}
train: {samples: 20, max_length: 32}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_recipe_then_flags(
    cli: Callable[..., Outcome],
    model: Path,
    text: Path,
    recipe: Path,
    tmp_path: Path,
) -> None:
    common = ("--data", text, "--train-data", text, "--json")
    first = cli("prune", model, "-o", tmp_path / "a", "--recipe", recipe, *common)
    assert first.code == 0, first.err
    result = json.loads(first.out)
    assert result["method"] == "magnitude"
    assert result["recovery"]["method"] == "losa"
    assert len(result["recovery"]["report"]["steps"]) == 2
    assert result["calibration"]["sequences"] == 2
    second = cli(
        "prune", model, "-o", tmp_path / "b", "--recipe", recipe, "-p", "2:4", "-m", "wanda",
        "--recover-option", "steps=1", *common,
    )  # fmt: skip
    assert second.code == 0, second.err
    result = json.loads(second.out)
    assert (result["pattern"], result["method"]) == ("2:4", "wanda")
    assert len(result["recovery"]["report"]["steps"]) == 1
    assert result["recovery"]["options"]["first_rank"] == 2, "options of the recipe that no flag names stay"


def test_recover_prints_what_it_did(cli: Callable[..., Outcome], model: Path, text: Path, tmp_path: Path) -> None:
    pruning = ("-s", "0.5", "--data", text, "-n", "2", "--calibration-length", "32")
    assert cli("prune", model, "-o", tmp_path / "p", *pruning).code == 0
    outcome = cli("recover", tmp_path / "p", "-o", tmp_path / "r", "-m", "sparse-lora", "--train-data", text)
    assert outcome.code == 0, outcome.err
    assert "sparsegpt, then sparse-lora" in outcome.out.replace("\n", " ")
    assert cli("inspect", tmp_path / "r").code == 0


def test_bad_input_is_one_line_and_code_2(cli: Callable[..., Outcome], model: Path, text: Path, tmp_path: Path) -> None:
    cases: list[tuple[tuple[Any, ...], str]] = [
        (("prune", model, "-s", "0.5", "--recover", "losa", "--data", text), "no training text was given"),
        (("prune", model, "--recipe", "losa-71"), "no recipe 'losa-71'"),
        (("recover", model, "--train-data", text), "has no sparsity.json"),
    ]
    for arguments, message in cases:
        outcome = cli(arguments[0], arguments[1], "-o", tmp_path / "out", *arguments[2:])
        assert outcome.code == 2
        errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert message in errors[0]
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_sound(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.title
    assert recipe.source
    assert recipe.sections["prune"].keys() & {"sparsity", "pattern"}


def test_the_published_settings_are_shipped() -> None:
    wanted = {"losa-50", "losa-60", "losa-70", "losa-mixed-2-8", "losa-mixed-2-4", "lsa-70", "lsa-70-block"}
    assert wanted | {"lsa-70-projection", "atp-70", "sparselo-50", "lsa-70-losa"} <= set(recipe_names())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"prune": {"sparsty": 0.5}}, "prune has no option 'sparsty'. Did you mean sparsity? Its options: allocation"),
        ({"prun": {}}, "unknown key 'prun'. Known: title, source, prune"),
        ({"prune": {"sparsity": "much"}}, "prune: option sparsity is 'much'. It takes a finite number"),
        ({"train": {"samples": True}, "prune": {}}, "train: option samples is True. It takes a whole number"),
        ({"prune": 3}, "prune is not a mapping"),
        ([1], "is not a mapping"),
        ({"title": "x"}, "neither prunes nor recovers"),
        ({"recover": {"method": "losa", "options": {"rank": 3}}}, "losa has no option 'rank'"),
        ({"recover": {"training": {"lr": 3}}}, "training has no option 'lr'"),
        ({"prune": {"allocation": "owl", "allocation_options": {"beta": 3}}}, "owl has no option 'beta'"),
        ({"prune": {"pattern": "2;4"}}, "pattern '2;4' is not known"),
    ],
)
def test_wrong_keys_are_named(value: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    assert message in str(caught.value)
    assert str(caught.value).startswith("recipe ")


def test_text_that_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("prune: {")
    with pytest.raises(UserError, match="is not YAML"):
        load_recipe(str(path))


def test_sections_default_to_nothing() -> None:
    recipe = parse_recipe({"prune": {"sparsity": 0.5}}, "r")
    assert recipe.sections == {"prune": {"sparsity": 0.5}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune: {sparsity: 0.5, sparsity: 0.7}", "the key 'sparsity' stands twice"),
        ("a: &a [1]\nprune: *a", "aliases are not read"),
        ("prune: " + "[" * 30 + "]" * 30, "more than 20 levels"),
        ("prune: {sparsity: .inf}", "option sparsity is inf. It takes a finite number"),
        ("prune: {sparsity: .nan}", "option sparsity is nan. It takes a finite number"),
        ("prune: {method: 2026-11-26}", "unknown pruning method '2026-11-26'"),
        (
            "prune: {sparsity: 0.5}\ncalibration: {batch_size: 0}",
            "batch_size is 0. It takes a whole number of at least 1",
        ),
        ("prune: {sparsity: 0.5}\ncalibration: {seed: " + "9" * 5000 + "}", "is not YAML"),
        ("prune: {sparsity: 0.5, plan: x}", "prune has no option 'plan'"),
        ("prune: {sparsity: 0.5}\ncalibration: {accumulate: yes}", "accumulate is True. It takes float32 or float64"),
        ("recover: {method: losa, options: {dynamic: 'perhaps'}}", "dynamic is 'perhaps'. It takes true or false"),
    ],
)
def test_hostile_recipes_are_refused_in_one_short_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_yaml_reads_what_a_user_means(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "prune: {pattern: 2:4, sparsity: 5e-1}\nrecover: {method: losa, options: {dynamic: false, steps: 2}}"
    )
    sections = load_recipe(str(path)).sections
    assert sections["prune"] == {"pattern": "2:4", "sparsity": 0.5}
    assert sections["recover"]["options"] == {"dynamic": False, "steps": 2}
