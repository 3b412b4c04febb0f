"""A comparison of two benchmark results as a table for the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from sparsedeploy.speed.comparison import Change, Comparison


def comparison_table(comparison: Comparison) -> Table:
    """Every change, a line each."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for at, header in enumerate(("", "", "old", "new", "change", "95 % interval", "")):
        table.add_column(header, justify="left" if at in (0, 1, 6) else "right", no_wrap=at != 0, overflow="fold")
    last = ""
    for change in comparison.changes:
        title = f"{change.name} on {change.runtime}, {change.setting}"
        if title != last:
            table.add_section()
            table.add_row(Text(title, style="bold"))
        last = title
        table.add_row(
            "",
            change.what,
            _value(change, change.old),
            _value(change, change.new),
            "" if change.change is None else f"{change.change:+.1%}",
            "" if change.low is None or change.high is None else f"{change.low:+.1%} {change.high:+.1%}",
            change.verdict,
        )
    return table


def _value(change: Change, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} ms" if change.low is not None else f"{value / 1e6:.1f} MB"
