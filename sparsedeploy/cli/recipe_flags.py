"""Flags over recipe over defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from sparsedeploy.options import parse_pairs

if TYPE_CHECKING:
    from sparsedeploy.workflows.recipes import Recipe


class RecipeFlags:
    """The values of a command's parameters: as typed, else as the recipe says, else their defaults."""

    def __init__(self, context: typer.Context, recipe: Recipe | None) -> None:
        self._context = context
        self._recipe = recipe

    def typed(self, flag: str) -> bool:
        """Whether the user gave the flag."""
        source = self._context.get_parameter_source(flag)
        return source is not None and source.name != "DEFAULT"

    def value(self, flag: str, value: Any, section: str, key: str) -> Any:
        """The flag's value."""
        recipe = self._of_recipe(section, key)
        return value if self.typed(flag) or recipe is None else recipe

    def options(self, pairs: list[str] | None, section: str, key: str, *, owner: str) -> Mapping[str, Any]:
        """NAME=VALUE flags over the recipe's options, which are dropped when the flag ``owner`` names a method."""
        recipe = {} if self.typed(owner) else self._of_recipe(section, key) or {}
        return {**recipe, **parse_pairs(pairs or [])}

    def _of_recipe(self, section: str, key: str) -> Any:
        return None if self._recipe is None else getattr(getattr(self._recipe, section), key)
