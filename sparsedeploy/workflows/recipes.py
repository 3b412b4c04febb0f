"""Recipes: whole pipelines as YAML, by name (shipped) or file. A wrong key is named, with those that would fit.

Sections, all optional but one of the first two: ``prune`` (what ``prune`` decides), ``recover`` (method, options,
training, seed), ``calibration`` (which text is measured), ``train`` (which text is trained on); and two lines for
readers, ``title`` and ``source``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparsedeploy.errors import UserError
from sparsedeploy.resources import shipped


@dataclass(frozen=True)
class PruneSection:
    """What ``prune`` decides; None leaves it to the command's default."""

    sparsity: float | None = None
    pattern: str | None = None
    pattern_options: Mapping[str, Any] | None = None
    method: str | None = None
    method_options: Mapping[str, Any] | None = None
    allocation: str | None = None
    allocation_options: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class CalibrationSection:
    """Which text is measured."""

    data: str | None = None
    field: str | None = None
    sequences: int | None = None
    length: int | None = None
    seed: int | None = None
    batch_size: int | None = None
    accumulate: str | None = None


@dataclass(frozen=True)
class RecoverSection:
    """How quality is won back."""

    method: str | None = None
    options: Mapping[str, Any] | None = None
    training: Mapping[str, Any] | None = None
    seed: int | None = None


@dataclass(frozen=True)
class TrainSection:
    """Which text is trained on."""

    data: str | None = None
    field: str | None = None
    samples: int | None = None
    max_length: int | None = None
    min_length: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A read recipe; ``name`` is how the user called it."""

    name: str
    title: str = ""
    source: str = ""
    prune: PruneSection = field(default_factory=PruneSection)
    calibration: CalibrationSection = field(default_factory=CalibrationSection)
    recover: RecoverSection = field(default_factory=RecoverSection)
    train: TrainSection = field(default_factory=TrainSection)


_SECTIONS: dict[str, type[Any]] = {
    "prune": PruneSection,
    "calibration": CalibrationSection,
    "recover": RecoverSection,
    "train": TrainSection,
}
_KINDS: dict[str, Any] = {"sparsity": (int, float), "sequences": int, "length": int, "seed": int, "batch_size": int}
_KINDS |= {"samples": int, "max_length": int, "min_length": int}


def recipe_names() -> list[str]:
    """The shipped recipes."""
    return sorted(path.stem for path in shipped("recipes").glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """Read a shipped recipe by name, or any file.

    Raises:
        UserError: no such recipe, not YAML, a key that is not known, or a value or method option that does not fit.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        path = shipped("recipes") / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"no recipe '{name}'", f"Shipped: {', '.join(recipe_names())}; or give a YAML file.")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"recipe {path} is not YAML ({reason})", "See the shipped recipes for the form.") from error
    recipe = parse_recipe(value, name)
    check_recipe(recipe)
    return recipe


def parse_recipe(value: Any, name: str) -> Recipe:
    """Check keys and types.

    Raises:
        UserError: naming the key.
    """
    if not isinstance(value, dict):
        raise UserError(f"recipe {name} is no mapping", f"Its sections: {', '.join(_SECTIONS)}.")
    parts: dict[str, Any] = {}
    for key, content in value.items():
        if key in ("title", "source"):
            parts[key] = str(content)
        elif key in _SECTIONS:
            parts[key] = _section(content, _SECTIONS[key], f"recipe {name}: {key}")
        else:
            raise UserError(f"recipe {name}: unknown key '{key}'", f"Known: title, source, {', '.join(_SECTIONS)}.")
    if not parts.keys() & {"prune", "recover"}:
        raise UserError(f"recipe {name} neither prunes nor recovers", "Add a section 'prune' or 'recover'.")
    return Recipe(name, **parts)


def check_recipe(recipe: Recipe) -> None:
    """Check methods and their options against the registries.

    Raises:
        UserError: an unknown method or option.
    """
    from sparsedeploy.allocation import ALLOCATORS, MixedOptions
    from sparsedeploy.options import build_options
    from sparsedeploy.plan import parse_pattern
    from sparsedeploy.pruning import PRUNERS
    from sparsedeploy.recovery import RECOVERIES
    from sparsedeploy.recovery.training import TrainingOptions

    prune, recover = recipe.prune, recipe.recover
    try:
        if prune.pattern is not None:
            parse_pattern(prune.pattern)
        if prune.method is not None:
            PRUNERS.get(prune.method).make_options(prune.method_options)
        if prune.allocation is not None:
            ALLOCATORS.get(prune.allocation).make_options(prune.allocation_options)
        build_options("a mixed pattern", MixedOptions, prune.pattern_options or {})
        if recover.method is not None:
            RECOVERIES.get(recover.method).make_options(recover.options)
        build_options("training", TrainingOptions, recover.training or {})
    except UserError as error:
        raise UserError(f"recipe {recipe.name}: {error.message}", error.fix) from None


def _section(content: Any, section: type[Any], where: str) -> Any:
    known = [each.name for each in dataclasses.fields(section)]
    if not isinstance(content, dict):
        raise UserError(f"{where} is no mapping", f"Its keys: {', '.join(known)}.")
    for key, value in content.items():
        if key not in known:
            raise UserError(f"{where} has no key '{key}'", f"Its keys: {', '.join(known)}.")
        kind = _KINDS.get(key, dict if key.endswith("options") or key == "training" else str)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UserError(f"{where}.{key} is {value!r}", "It takes " + _KIND_NAMES[kind] + ".")
    return section(**content)


_KIND_NAMES: dict[Any, str] = {int: "a whole number", (int, float): "a number", dict: "a mapping", str: "text"}
