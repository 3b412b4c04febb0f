"""The parts of a self-contained HTML page: no network, light and dark, wide and narrow, whole without its script."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from sparsedeploy.reporting.charts import Chart


def page(title: str, sections: Iterable[str]) -> str:
    """A whole page; empty sections are left out."""
    return _environment().get_template("page.html").render(title=title, sections=list(sections)) + "\n"


def section(title: str, *content: Markup) -> Markup:
    """A part with a heading of its own."""
    return _part("section", title, Markup("").join(content))


def note(text: str) -> Markup:
    return _part("note", text)


def items(texts: Iterable[str]) -> Markup:
    return _part("items", list(texts))


def figure(chart: Chart, caption: str, commands: Sequence[str] = ()) -> Markup:
    """A chart with its caption and the commands that repeat it."""
    return _part("figure", chart, caption, commands)


def commands_block(commands: Sequence[str]) -> Markup:
    """Commands to copy."""
    return _part("commands", commands)


def table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True, label: str | None = None
) -> Markup:
    """A table; with ``numbers`` all but the first column are aligned right, and a click on a heading sorts it.

    A row of a single cell is a heading of the rows after it.

    Args:
        label: its accessible name.
    """
    return _part("table", headers, list(rows), "numbers" if numbers else "pairs", label or "table")


def details(title: str, *content: Markup) -> Markup:
    """What is shown when it is asked for."""
    return _part("details", title, Markup("").join(content))


def beside(*parts: Markup) -> Markup:
    """Parts beside each other where there is room."""
    return _part("beside", parts)


def levels(name: str, label: str, parts: Sequence[tuple[str, Markup]]) -> Markup:
    """Named parts of one kind, below each other; with scripts a slider shows one at a time.

    Args:
        name: an identifier of its own on the page.
        label: of the slider.
    """
    return _part("levels", name, label, parts)


def sample(name: str, pieces: Sequence[tuple[str, bool]], told: str) -> Markup:
    """A generated text; pieces that differ are marked, and ``told`` says so in words."""
    return _part("sample", name, pieces, told)


def prompt(text: str) -> Markup:
    return _part("prompt", text)


def pairs(values: Mapping[str, Any]) -> Markup:
    """A table of names and values."""
    return table(("setting", "value"), [(key, _text(value)) for key, value in values.items()], numbers=False)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _part(name: str, *values: Any) -> Markup:
    """One of the macros of ``templates/parts.html``."""
    made: Markup = getattr(_environment().get_template("parts.html").module, name)(*values)
    return made


@cache
def _environment() -> Environment:
    return Environment(loader=PackageLoader("sparsedeploy.reporting"), autoescape=True, trim_blocks=True)
