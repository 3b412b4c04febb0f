"""The report of a sweep: which cells are on the Pareto front of size and perplexity, as table, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from sparsedeploy.reporting.charts import Series, line_chart
from sparsedeploy.reporting.page import commands_block, figure, note, page, pairs, section, table

Row = Mapping[str, Any]
_HEADERS = ("cell", "sparsity", "perplexity", "to dense", "packed", "front", "ship", "time")
_NOTE = (
    "Packed: 16-bit values of the weights that are left, or their codes and scales, and one bit for each that could "
    "have been pruned. Front: no other cell is both smaller and better. Ship: nothing stands beside the weights, so "
    "every target takes it."
)


def marked(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with ``deployable`` (measured, and no factors beside the weights) and ``front``: whether no other
    deployable row is at most as large and at most as perplexed, and less in one of both."""
    able = [{**row, "deployable": row["perplexity"] is not None and not row["adapter"]} for row in rows]
    points = [(row["packed_bytes"], row["perplexity"]) for row in able if row["deployable"]]
    return [
        {**row, "front": row["deployable"] and not _beaten(row["packed_bytes"], row["perplexity"], points)}
        for row in able
    ]


def _beaten(size: float, value: float, points: Iterable[tuple[float, float]]) -> bool:
    return any(a <= size and b <= value and (a < size or b < value) for a, b in points)


def _cells(row: Row, dense: float | None) -> tuple[str, ...]:
    value = row["perplexity"]
    text = row["error"] or "diverged" if value is None else f"{value:.2f}"
    return (
        row["name"],
        f"{row['sparsity']:.0%}",
        "failed" if row["error"] else text,
        "" if value is None or not dense else f"{value / dense:.2f}x",
        f"{row['packed_bytes'] / 1e6:.1f} MB",
        "*" if row["front"] else "",
        "yes" if row["deployable"] else "",
        "" if row["seconds"] is None else f"{row['seconds']:.0f} s",
    )


def _rows(cells: Sequence[Row]) -> list[tuple[str, ...]]:
    dense = next((row["perplexity"] for row in cells if row["pattern"] == "dense" and not row["error"]), None)
    return [_cells(row, dense) for row in cells]


def summary_table(cells: Sequence[Row]) -> Table:
    """The table for the terminal, narrow: names of cells are long."""
    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for at, header in enumerate(_HEADERS):
        shown.add_column(header, justify="left" if at == 0 else "right", no_wrap=at > 0, overflow="fold")
    for row in _rows(cells):
        shown.add_row(*row)
    return shown


def markdown_table(cells: Sequence[Row]) -> str:
    """The same table in Markdown."""
    lines = [f"| {' | '.join(_HEADERS)} |", "|---|" + "---:|" * (len(_HEADERS) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in _rows(cells))]) + f"\n\n{_NOTE}\n"


def html_page(report: Mapping[str, Any]) -> str:
    """One self-contained page: perplexity against sparsity, the table, and what repeats each cell."""
    cells = report["cells"]
    sections = [section("Cells", note(_NOTE), table(_HEADERS, _rows(cells)))]
    lines = _lines(cells)
    if lines:
        chart = line_chart(
            lines, title="perplexity against sparsity", x_label="sparsity, %", y_label="perplexity", log_y=True
        )
        sections.insert(0, section("Perplexity against sparsity", figure(chart, "Unstructured cells by method.")))
    commands = [command for row in cells for command in row["commands"]]
    sections += [
        section(
            "Setting", pairs({"model": report["model"], **report["eval"]["text"], "context": report["eval"]["context"]})
        )
    ]
    sections += [section("Commands", commands_block([report["command"], *commands]))]
    return page("sparsedeploy sweep", sections)


def _lines(cells: Sequence[Row]) -> list[Series]:
    """One line for each method, allocation and recovery with several rates."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in cells:
        if row["perplexity"] is not None and row["pattern"] == "unstructured":
            name = ", ".join(str(part) for part in (row["method"], row["allocation"], row["recovery"]) if part)
            found.setdefault(name, []).append((100 * row["sparsity"], row["perplexity"]))
    return [Series(name, sorted(points)) for name, points in found.items() if len(points) > 1]
