"""Names and texts of models, commands and engines are data: in a page they are never markup."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from sparsedeploy.reporting.benchmark_page import benchmark_page
from sparsedeploy.reporting.report import html_report
from sparsedeploy.reporting.sweep import html_page, marked
from tests.reporting.results import bench_result, report

BAD = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
# What a user, a model's folder or an engine gives.
NAMED = ("name", "title", "command", "commands", "summary", "prompt", "tokens", "data", "split", "reason", "notes")
NAMED += (
    "folder",
    "method",
    "allocation",
    "versions",
    "processor",
    "artifacts",
    "detail",
    "kind",
    "pattern",
    "recovery",
)


def poisoned(value: Any, inside: bool = False) -> Any:
    """The same with markup at the end of every string that somebody gives."""
    if isinstance(value, dict):
        return {key: poisoned(item, inside or key in NAMED) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [poisoned(item, inside) for item in value]
    return f"{value}{BAD}" if inside and isinstance(value, str) else value


class Tags(HTMLParser):
    """Counts scripts, images and handlers of events."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [tag] if tag in ("script", "img", "iframe") else []
        self.found += [name for name, _ in attributes if name.startswith("on")]


def tags(page: str) -> list[str]:
    parser = Tags()
    parser.feed(page)
    return parser.found


def swept(poison: Callable[[Any], Any]) -> dict[str, Any]:
    row = {"name": "a", "method": "wanda", "allocation": "uniform", "recovery": None, "pattern": "unstructured"}
    row |= {
        "sparsity": 0.5,
        "perplexity": 20.0,
        "packed_bytes": 10,
        "adapter": False,
        "error": None,
        "commands": ["x"],
        "seconds": 1.0,
    }
    dense = {**row, "name": "dense", "sparsity": 0.0, "perplexity": 10.0, "method": None, "allocation": None}
    setting = {"text": {"data": ["t"]}, "context": 32}
    return poison({"model": "m", "command": "c", "eval": setting, "cells": marked([dense, row])})


@pytest.mark.parametrize(
    ("draw", "values"), [(html_report, report), (benchmark_page, bench_result)], ids=["report", "benchmark"]
)
def test_pages(draw: Callable[[Any], str], values: Callable[[], dict[str, Any]]) -> None:
    sound, hostile = draw(values()), draw(poisoned(values()))
    assert "alert(1)" in hostile
    assert BAD not in hostile
    assert sorted(tags(hostile)) == sorted(tags(sound))


def test_a_sweeps_page() -> None:
    sound, hostile = html_page(swept(lambda row: row)), html_page(swept(poisoned))
    assert "alert(1)" in hostile
    assert BAD not in hostile
    assert sorted(tags(hostile)) == sorted(tags(sound))
