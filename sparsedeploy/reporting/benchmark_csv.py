"""A benchmark's rows as CSV, one line each, for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from sparsedeploy.reporting.benchmark_table import PHASES

_FACTS = ("name", "runtime", "baseline", "sparsity", "dtype", "status", "reason")
_SIZES = ("artifact_bytes", "load_seconds", "peak_memory_bytes", "decode_limit", "weight_bytes", "read_ms", "sha256")


def benchmark_csv(result: Mapping[str, Any]) -> str:
    """Settings, then median and interval of every phase's time (ms) and speedup, rates (tokens/s) and sizes (bytes)."""
    text = io.StringIO()
    lines = [_line(row) for row in result["rows"]]
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    line = {**{name: row[name] for name in _FACTS}, **row["setting"]}
    for phase in PHASES:
        figures = row[phase] or {}
        for name in ("ms", "speedup"):
            summary = figures.get(name) or {}
            for key in ("median", "low", "high"):
                line[f"{phase}_{name}_{key}"] = summary.get(key)
        line[f"{phase}_outliers"] = len(figures["ms"]["outliers"]) if figures else None
        line[f"{phase}_tokens_per_second"] = figures.get("tokens_per_second")
    return {**line, **{name: row[name] for name in _SIZES}}
