"""A picture of one mask: where the whole matrix keeps weights, a corner weight by weight, and the share by column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from sparsedeploy.plan import NM
from sparsedeploy.reporting.charts import BOX_LEFT, BOX_WIDTH, Chart, Series, line_chart

_CELLS = 96  # of the longer side of the map
_CORNER = (32, 64)
_SHADES = 16
_TOP, _BELOW = 8, 46


def mask_charts(name: str, mask: torch.Tensor, pattern: NM | None) -> list[Chart]:
    """Draw a mask, bool ``[rows, columns]``, True where kept.

    Args:
        pattern: where there is one, lines mark the groups of the corner.
    """
    rows, columns = mask.shape
    kept = float(mask.float().mean())
    shares = mask.float().mean(dim=0)
    width = max(1, -(-columns // 256))
    by_column = [
        (at, float(part.mean())) for at, part in zip(range(0, columns, width), shares.split(width), strict=True)
    ]
    every = f"each {width} columns" if width > 1 else "column"
    return [
        _map(f"{name}: {rows} x {columns}, {kept:.1%} kept", mask),
        _corner(mask, pattern),
        line_chart(
            [Series("kept", by_column)],
            title=f"Share of weights kept, by {every}",
            x_label="input column",
            y_label="kept",
            whole_x=True,
        ),
    ]


def _map(title: str, mask: torch.Tensor) -> Chart:
    """The matrix in at most 96 cells a side, each as dark as the part of its weights that is kept."""
    rows, columns = mask.shape
    scale = max(1.0, max(rows, columns) / _CELLS)
    down, across = max(1, round(rows / scale)), max(1, round(columns / scale))
    density = torch.nn.functional.adaptive_avg_pool2d(mask.float()[None, None], (down, across))[0, 0]
    low, high = float(density.min()), float(density.max())
    shade = ((density - low) / ((high - low) or 1.0) * (_SHADES - 1)).round().int()
    cell = BOX_WIDTH / max(across, down, _CELLS // 2)
    parts = list(_cells(shade, cell))
    height = _TOP + cell * down
    label = f"{columns} input columns; light to dark: {low:.0%} to {high:.0%} of a cell's weights kept"
    parts.append(f'<text class="axis" x="{BOX_LEFT}" y="{height + 20:.0f}">{label}</text>')
    return Chart(parts, [], title, round(height) + _BELOW)


def _corner(mask: torch.Tensor, pattern: NM | None) -> Chart:
    part = mask[: _CORNER[0], : _CORNER[1]]
    rows, columns = part.shape
    cell = BOX_WIDTH / _CORNER[1]
    parts = list(_cells(part.int() * (_SHADES - 1), cell))
    height = _TOP + cell * rows
    if pattern is not None:
        lines = "".join(f"M{BOX_LEFT + cell * at:.2f} {_TOP}V{height:.1f}" for at in range(0, columns + 1, pattern.m))
        parts.append(f'<path class="line c1" d="{lines}"/>')
    what = f"; lines: groups of {pattern.m}, of which {pattern.n} stay" if pattern is not None else ""
    text = f"dark: kept{what}"
    parts.append(f'<text class="axis" x="{BOX_LEFT}" y="{height + 20:.0f}">{text}</text>')
    return Chart(parts, [], f"The first {rows} rows and {columns} columns, weight by weight", round(height) + _BELOW)


def _cells(shade: torch.Tensor, cell: float) -> Iterator[str]:
    """One path for each shade: rows of squares, neighbours joined."""
    paths: dict[int, list[str]] = {}
    for row, values in enumerate(shade.tolist()):
        for value, first, last in _runs(values):
            x, y = BOX_LEFT + first * cell, _TOP + row * cell
            wide = (last - first) * cell
            paths.setdefault(value, []).append(f"M{x:.1f} {y:.1f}h{wide:.1f}v{cell:.1f}h-{wide:.1f}z")
    for value, path in sorted(paths.items()):
        opacity = 0.04 + 0.96 * value / (_SHADES - 1)
        yield f'<path class="bar c0" fill-opacity="{opacity:.2f}" d="{"".join(path)}"/>'


def _runs(values: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(value, first, behind the last) of equal neighbours."""
    first = 0
    for at in range(1, len(values) + 1):
        if at == len(values) or values[at] != values[first]:
            yield values[first], first, at
            first = at
