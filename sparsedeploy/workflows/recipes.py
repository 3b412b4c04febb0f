"""Recipes: whole pipelines as YAML, by name (shipped) or file. A wrong key is named, with those that would fit.

The sections are the options dataclasses themselves, see :data:`sparsedeploy.workflows.options.SECTIONS`; ``prune`` or
``recover`` must be there. Two lines are for readers, ``title`` and ``source``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparsedeploy.allocation import ALLOCATORS, MixedOptions
from sparsedeploy.conversion import build_options, convert_options, shown
from sparsedeploy.errors import UserError
from sparsedeploy.paths import expand
from sparsedeploy.plan import parse_pattern
from sparsedeploy.pruning import PRUNERS
from sparsedeploy.reading import read_text
from sparsedeploy.recovery.training import TrainingOptions
from sparsedeploy.registry import RECOVERIES
from sparsedeploy.resources import shipped
from sparsedeploy.workflows.options import SECTIONS, recipe_names

_FORM = "See the shipped recipes for the form."
_LIMIT = 1 << 20  # bytes
_DEPTH = 20


@dataclass(frozen=True)
class Recipe:
    """A read recipe.

    Attributes:
        name: how the user called it.
        sections: section -> option -> value, converted to the option's type; what the recipe leaves out is not there.
    """

    name: str
    title: str
    source: str
    sections: Mapping[str, Mapping[str, Any]]


def load_recipe(name: str) -> Recipe:
    """Read a shipped recipe by name, or any file.

    Raises:
        UserError: no such recipe, not YAML, a key that is not known, or a value or method option that does not fit.
    """
    path = expand(name)
    if not path.exists():
        path = shipped("recipes") / f"{name}.yaml"
    if not path.exists():
        raise UserError(f"no recipe '{name}'", f"Shipped: {', '.join(recipe_names())}; or give a YAML file.")
    return parse_recipe(read_yaml(path, "recipe", _FORM), name)


def read_yaml(path: Path, kind: str, fix: str) -> Any:
    """The plain data of a YAML file, of which ``kind`` says what it is.

    Raises:
        UserError: no such file, too large, or not YAML.
    """
    text = read_text(path, limit=_LIMIT, fix=fix)
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        long = "a number has thousands of digits" if "digits" in str(error) else ""
        reason = long or " ".join(str(error).replace('in "<unicode string>",', "at").split())[:200]
        raise UserError(f"{kind} {path} is not YAML ({reason})", fix) from error


def parse_recipe(value: Any, name: str) -> Recipe:
    """Check keys, types, methods and their options.

    Raises:
        UserError: naming the key.
    """
    if not isinstance(value, dict):
        raise UserError(f"recipe {name} is not a mapping", f"Its sections: {', '.join(SECTIONS)}.")
    sections: dict[str, dict[str, Any]] = {}
    for key, content in value.items():
        if key in ("title", "source"):
            continue
        if key not in SECTIONS:
            raise UserError(f"recipe {name}: unknown key {shown(key)}", f"Known: title, source, {', '.join(SECTIONS)}.")
        if not isinstance(content, dict):
            raise UserError(f"recipe {name}: {key} is not a mapping", _FORM)
        given = {option: each for option, each in content.items() if each is not None}
        sections[key] = convert_options(f"recipe {name}: {key}", SECTIONS[key], given)
    if not sections.keys() & {"prune", "recover"}:
        raise UserError(f"recipe {name} neither prunes nor recovers", "Add a section 'prune' or 'recover'.")
    try:
        _check_methods(sections.get("prune", {}), sections.get("recover", {}))
    except UserError as error:
        raise UserError(f"recipe {name}: {error.message}", error.fix) from None
    return Recipe(name, str(value.get("title", "")), str(value.get("source", "")), sections)


def _check_methods(prune: Mapping[str, Any], recover: Mapping[str, Any]) -> None:
    """Check methods and their options against the registries.

    Raises:
        UserError: an unknown method or option.
    """
    if "pattern" in prune:
        parse_pattern(prune["pattern"])
    for values, key, options, registry in (
        (prune, "method", "method_options", PRUNERS),
        (prune, "allocation", "allocation_options", ALLOCATORS),
        (recover, "method", "options", RECOVERIES),
    ):
        if key in values:
            registry.get(values[key]).make_options(values.get(options))
    build_options("a mixed pattern", MixedOptions, prune.get("pattern_options", {}))
    build_options("training", TrainingOptions, recover.get("training", {}))


class _Loader(yaml.SafeLoader):
    """YAML without aliases, repeated keys, dates and numbers to the base of sixty: ``2:4`` is a pattern, not 124."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read", self.peek_event().start_mark)
        self.levels = getattr(self, "levels", 0) + 1
        if self.levels > _DEPTH:
            raise yaml.composer.ComposerError(None, None, f"more than {_DEPTH} levels", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for at, name in enumerate(names):
            if name in names[:at]:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{name}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(r"[-+]?[0-9]+$") if tag == "tag:yaml.org,2002:int" else pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.[0-9]*([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+|\.inf|\.nan)$", re.IGNORECASE),
    list("-+0123456789."),
)
