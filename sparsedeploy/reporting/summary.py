"""A report's figures by model: rows of tables for the terminal, Markdown and HTML, and the score of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from sparsedeploy.plan import depths
from sparsedeploy.reporting.benchmark_table import rows_at, setting_title, settings, times

# The first of these that a task has is its score. The pruning papers report acc for their tasks.
_METRICS = ("acc", "acc_norm", "exact_match")


def layer_sparsity(plan: Mapping[str, Any]) -> list[float]:
    """The parameter-weighted sparsity of each decoder layer of a plan (as plain data), by depth; the head's last."""
    totals: dict[int, list[int]] = {}
    depth_of = depths(module["name"] for module in plan["modules"])
    for module in plan["modules"]:
        total = totals.setdefault(depth_of[module["name"]], [0, 0])
        total[0] += module["rows"] * module["zeros_per_row"]
        total[1] += module["rows"] * module["columns"]
    return [zeros / size for _, (zeros, size) in sorted(totals.items())]


def summary_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row an engine and model: quality, size and speed side by side, as plain figures, in the first setting.

    Speeds are None for a model that was not measured, quality for the probe's.
    """
    models = {model["name"]: model for model in report["models"]}
    rows = []
    for group, measured in [("", one) for one in engines_of(report)] + [("probe", one) for one in probes_of(report)]:
        result = measured["benchmark"]
        for row in rows_at(result, settings(result)[0]):
            model = models.get(row["name"]) if not group else None
            there = row["status"] == "measured"
            rows.append(
                {
                    "engine": measured["engine"],
                    "model": row["name"],
                    "probe": bool(group),
                    "sparsity": row["sparsity"],
                    "perplexity": model["quality"]["perplexity"] if model else None,
                    "accuracy": accuracy(model["quality"].get("tasks")) if model else None,
                    "nonzero_millions": model["nonzero_weights"] / 1e6 if model else None,
                    "size_mb": row["artifact_bytes"] / 1e6,
                    "baseline": row["baseline"],
                    "prefill_ms": row["prefill"]["ms"]["median"] if there else None,
                    "prefill_speedup": row["prefill"]["speedup"] if there else None,
                    "decode_ms": row["decode"]["ms"]["median"] if there else None,
                    "decode_speedup": row["decode"]["speedup"] if there else None,
                    "decode_limit": None if row["baseline"] else row["decode_limit"],
                    "why": measured["why"].get(row["name"], ""),
                }
            )
    return rows


def engines_of(report: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The benchmark of each engine; a report of one benchmark has one."""
    if "engines" in report:
        found: Sequence[Mapping[str, Any]] = report["engines"]
        return found
    runtimes = dict.fromkeys(row["runtime"] for row in report["benchmark"]["rows"])
    return [{"engine": ", ".join(runtimes), "benchmark": report["benchmark"], "why": {}}]


def probes_of(report: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    found: Sequence[Mapping[str, Any]] = report.get("probe", {}).get("engines", [])
    return found


def first_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the models in the first engine."""
    first = engines_of(report)[0]["engine"]
    return [row for row in summary_rows(report) if row["engine"] == first and not row["probe"]]


def results(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every benchmark of the report: the models' in each engine, then the probe's."""
    return [one["benchmark"] for one in [*engines_of(report), *probes_of(report)]]


def score(metrics: Mapping[str, Any]) -> tuple[str, float, float | None] | None:
    """The metric that stands for a task, its value and its standard error (None where unknown)."""
    names = [name for name in metrics if "stderr" not in name]
    names.sort(key=lambda name: _METRICS.index(name) if name in _METRICS else len(_METRICS))
    if not names:
        return None
    error = metrics.get(f"{names[0]}_stderr", metrics.get("stderr"))
    return names[0], metrics[names[0]], error


def accuracy(tasks: Mapping[str, Mapping[str, Any]] | None) -> float | None:
    """The plain mean of the tasks' scores."""
    found = [one[1] for one in map(score, (tasks or {}).values()) if one is not None]
    return sum(found) / len(found) if found else None


HEADERS = (
    "engine",
    "model",
    "sparsity",
    "perplexity",
    "size",
    "non-zero",
    "prefill",
    "ms",
    "decode",
    "ms",
    "limit",
)


_NARROW = ("engine", "model", "perplexity", "size", "prefill", "decode", "limit")


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["engine"],
        row["model"],
        f"{row['sparsity']:.0%}",
        "" if row["perplexity"] is None else f"{row['perplexity']:.2f}",
        f"{row['size_mb']:.1f} MB",
        "" if row["nonzero_millions"] is None else f"{row['nonzero_millions']:.2f} M",
        *speed_cells(row, "prefill"),
        *speed_cells(row, "decode"),
        "" if row["decode_limit"] is None else f"{row['decode_limit']:.2f}x",
    )


def speed_cells(row: Mapping[str, Any], phase: str) -> tuple[str, str]:
    if row[f"{phase}_ms"] is None:
        return "failed", ""
    return "1x" if row["baseline"] else times(row[f"{phase}_speedup"]), f"{row[f'{phase}_ms']:.2f}"


def summary_table(report: Mapping[str, Any]) -> Table:
    """The table that the terminal shows: prefill and decode as speedups over the dense model in the same engine."""
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for at, header in enumerate(_NARROW):
        shown.add_column(header, justify="left" if at < 2 else "right", no_wrap=True)
    before = None
    for row in summary_rows(report):
        found = dict(zip(HEADERS, cells(row), strict=True))
        group = (row["engine"], row["probe"])
        if before not in (None, group):
            shown.add_row()
        before = group
        shown.add_row(*(found[header] for header in _NARROW))
    return shown


def notes(report: Mapping[str, Any]) -> list[str]:
    """What the terminal prints below the table: how it was measured, and a sentence for each row."""
    lines = ["", heading(engines_of(report)[0]["benchmark"])]
    lines.append(
        "prefill and decode: times faster than dense in the same engine; ?: the 95 % interval includes 1. "
        "limit: what memory traffic allows."
    )
    if probes_of(report):
        lines.append(f"probe: {report['probe']['title']}: for speed only, its text means nothing.")
    lines.append("")
    lines += reasons(report)
    lines += report.get("skipped", [])
    lines += dict.fromkeys(f"note: {text}" for result in results(report) for text in result["notes"])
    return lines


def reasons(report: Mapping[str, Any]) -> list[str]:
    """Why each row is faster than the dense model or not; rows with the same sentence share it."""
    told: dict[str, list[str]] = {}
    for row in summary_rows(report):
        if row["why"] and not row["baseline"]:
            told.setdefault(row["why"], []).append(f"{row['model']} in {row['engine']}")
    return [f"{', '.join(rows)}: {sentence}" for sentence, rows in told.items()]


def heading(measured: Mapping[str, Any]) -> str:
    """One line: where and how the speed was measured."""
    setting = settings(measured)[0]
    return (
        f"{measured['machine']['processor']}: {setting_title(setting, measured)}, "
        f"{measured['options']['rounds']} interleaved rounds, "
        f"memory bandwidth {measured['bandwidth'][str(setting['cores'])]['best']:.1f} GB/s"
    )
