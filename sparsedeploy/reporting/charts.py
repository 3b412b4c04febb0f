"""Small line, bar and scatter charts and heat maps as SVG: inline in a page, or in a file of their own.

No script, no network; colours come from the style sheet of the page, in a file from its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 92, 24, 14, 52
# Where a picture drawn by someone else may lie, beside the charts of this module.
BOX_LEFT, BOX_WIDTH = _LEFT, _WIDTH - _LEFT - _RIGHT
# Of the lines and bars of a chart; templates/style.css has the same as --c0 to --c8, and others for dark pages.
_PALETTE = ("#2563b8", "#d0651d", "#2a8a4a", "#8a3fa0", "#b08900", "#c0304f", "#0f8a94", "#7a5230", "#5f6b76")
# Of a letter, on average, at the size that it has on a narrow screen.
_LETTER = 9.0
_LARGEST_RADIUS = 22
# Height of a row of a heat map.
_CELL = 22


@dataclass(frozen=True)
class Chart:
    """A drawn chart.

    Attributes:
        parts: SVG elements, in a box of ``width`` by ``height``.
        names: of the series, in the order of their colours.
        title: its accessible name.
    """

    parts: Sequence[str]
    names: Sequence[str]
    title: str
    height: int = _HEIGHT

    def _repr_svg_(self) -> str:
        """The picture as a notebook shows it."""
        return svg_file([self])

    def __html__(self) -> str:
        """The picture, and below it the key in HTML, which wraps and keeps its size on a narrow screen."""
        key = "".join(
            f'<span><svg class="swatch" viewBox="0 0 12 12" aria-hidden="true">'
            f'<rect class="bar c{number % len(_PALETTE)}" width="12" height="12"/></svg>{escape(name)}</span> '
            for number, name in enumerate(self.names)
        )
        picture = (
            f'<svg class="chart" viewBox="0 0 {_WIDTH} {self.height}" role="img" '
            f'aria-label="{escape(self.title, quote=True)}">{"".join(self.parts)}</svg>'
        )
        return f'{picture}<p class="key">{key}</p>' if self.names else picture


@dataclass(frozen=True)
class Series:
    """A named line: points (x, y), y finite."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """A bar and, if known, the range that its value came from and a limit that it cannot exceed."""

    value: float
    low: float | None = None
    high: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Disc:
    """A point of a scatter chart; its area is proportional to ``area``, and ``note`` is added to its hover text.

    Discs of one ``group`` share a colour and a place in the legend; ``mark`` is written beside the disc.
    """

    name: str
    x: float
    y: float
    area: float
    note: str = ""
    group: str = ""
    mark: str = ""


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, log_y: bool = False, whole_x: bool = False
) -> Chart:
    """A line chart; the title is its accessible name. ``whole_x`` keeps the marks of x at whole numbers."""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    x_axis = _ticks(min(xs), max(xs), smallest=1.0 if whole_x else 0.0)
    y_axis = _log_ticks(min(ys), max(ys)) if log_y else _ticks(min(ys), max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        height = (math.log(y / y_axis[0]) / math.log(y_axis[-1] / y_axis[0])) if log_y else _share(y, y_axis)
        return _x(_share(x, x_axis)), _y(height)

    parts = [_frame(title, x_label, y_label)]
    parts += [_x_tick(at(x, y_axis[0])[0], f"{x:g}") for x in x_axis]
    parts += [_y_tick(at(x_axis[0], y)[1], f"{y:g}") for y in y_axis]
    for number, line in enumerate(series):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line.points))
        parts.append(f'<polyline class="line c{number % len(_PALETTE)}" points="{path}"/>')
        for point in line.points:
            x, y = at(*point)
            label = escape(f"{line.name}: {point[0]:g}, {point[1]:.4g}")
            parts.append(
                f'<circle class="dot c{number % len(_PALETTE)}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                f"<title>{label}</title></circle>"
            )
    return Chart(parts, [line.name for line in series], title)


def bar_chart(
    groups: Sequence[str],
    series: Mapping[str, Sequence[Bar]],
    *,
    title: str,
    y_label: str,
    line_at: float | None = None,
) -> Chart:
    """Grouped bars, one colour per series; ``line_at`` draws a level to compare with, such as 1x."""
    highest = max(max(bar.value, bar.high or 0, bar.limit or 0) for bars in series.values() for bar in bars)
    y_axis = _ticks(0, max(highest, line_at or 0))
    parts = [_frame(title, "", y_label)]
    parts += [_y_tick(_y(_share(y, y_axis)), f"{y:g}") for y in y_axis]
    slot = 1 / len(groups)
    width = slot * 0.7 / len(series)
    for at, group in enumerate(groups):
        parts.append(_x_tick(_x((at + 0.5) * slot), _shorten(group, slot)))
        for number, (name, bars) in enumerate(series.items()):
            bar = bars[at]
            left = _x((at + 0.15) * slot + number * width)
            right = _x((at + 0.15) * slot + (number + 0.9) * width)
            middle, top = (left + right) / 2, _y(_share(bar.value, y_axis))
            label = escape(f"{group}, {name}: {bar.value:.3g}")
            parts.append(
                f'<rect class="bar c{number % len(_PALETTE)}" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
                f'height="{_y(0) - top:.1f}"><title>{label}</title></rect>'
            )
            if bar.low is not None and bar.high is not None:
                low, high = _y(_share(bar.low, y_axis)), _y(_share(bar.high, y_axis))
                parts.append(
                    f'<line class="whisker" x1="{middle:.1f}" x2="{middle:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
                )
            if bar.limit is not None:
                level = _y(_share(bar.limit, y_axis))
                parts.append(
                    f'<line class="limit" x1="{left:.1f}" x2="{right:.1f}" y1="{level:.1f}" y2="{level:.1f}">'
                    f"<title>{escape(f'limit {bar.limit:.3g}')}</title></line>"
                )
    if line_at is not None:
        level = _y(_share(line_at, y_axis))
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
    return Chart(parts, list(series), title)


def scatter_chart(
    discs: Sequence[Disc], *, title: str, x_label: str, y_label: str, log_y: bool = False, lower_is_better: bool = True
) -> Chart:
    """Named discs, and a dashed line through those that no other one beats in both directions (more x is better)."""
    x_axis = _ticks(min(0.0, *(disc.x for disc in discs)), max(disc.x for disc in discs))
    ys = [disc.y for disc in discs]
    y_axis = _log_ticks(min(ys), max(ys)) if log_y else _ticks(min(ys), max(ys))

    def x_of(value: float) -> float:
        return _x(_inset(_share(value, x_axis), _WIDTH - _LEFT - _RIGHT))

    def y_of(value: float) -> float:
        share = math.log(value / y_axis[0]) / math.log(y_axis[-1] / y_axis[0]) if log_y else _share(value, y_axis)
        return _y(_inset(share, _HEIGHT - _TOP - _BOTTOM))

    parts = [_frame(title, x_label, y_label)]
    parts += [_x_tick(x_of(tick), f"{tick:g}") for tick in x_axis]
    parts += [_y_tick(y_of(tick), f"{tick:g}") for tick in y_axis]
    best = pareto_front(discs, lower_is_better)
    front = " ".join(f"{x_of(disc.x):.1f},{y_of(disc.y):.1f}" for disc in best)
    parts.append(f'<polyline class="front" points="{front}"/>')
    largest = max(disc.area for disc in discs)
    names = list(dict.fromkeys(disc.group or disc.name for disc in discs))
    for disc in sorted(discs, key=lambda disc: -disc.area):
        number = names.index(disc.group or disc.name)
        x, y = x_of(disc.x), y_of(disc.y)
        radius = max(4.0, _LARGEST_RADIUS * math.sqrt(disc.area / largest))
        label = escape(f"{disc.name}: {disc.x:.3g}, {disc.y:.4g}{disc.note}")
        parts.append(
            f'<circle class="dot disc c{number % len(_PALETTE)}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">'
            f"<title>{label}</title></circle>"
        )
        if disc.mark:
            parts.append(f'<text class="tick" x="{x + radius + 2:.1f}" y="{y + 4:.1f}">{escape(disc.mark)}</text>')
    return Chart(parts, names, title)


def _inset(share: float, length: float) -> float:
    """Leave room for a disc on either side."""
    margin = _LARGEST_RADIUS / length
    return margin + share * (1 - 2 * margin)


def pareto_front(discs: Sequence[Disc], lower_is_better: bool = True) -> list[Disc]:
    """Those that no other one matches in x and y and beats in one of them, by x."""
    sign = 1 if lower_is_better else -1

    def beats(a: Disc, b: Disc) -> bool:
        return a.x >= b.x and sign * a.y <= sign * b.y and (a.x, a.y) != (b.x, b.y)

    best = [disc for disc in discs if not any(beats(other, disc) for other in discs)]
    return sorted(best, key=lambda disc: disc.x)


def heat_map(rows: Mapping[str, Sequence[float | None]], *, title: str, x_label: str, darkest: float = 1.0) -> Chart:
    """Rows of cells from 0 (light) to ``darkest``, None left empty; the value is in each cell's hover text."""
    columns = max(len(values) for values in rows.values())
    bottom = _TOP + _CELL * len(rows)
    width = (_WIDTH - _LEFT - _RIGHT) / columns
    parts = [
        f"<title>{escape(title)}</title>",
        f'<text class="axis" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{bottom + 38}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
    ]
    for line, (name, values) in enumerate(rows.items()):
        top = _TOP + _CELL * line
        parts.append(
            f'<text class="tick" x="{_LEFT - 7}" y="{top + 0.7 * _CELL:.1f}" text-anchor="end">'
            f"{escape(_shorten(name, 0.14))}</text>"
        )
        for at, value in enumerate(values):
            if value is not None:
                parts.append(
                    f'<rect class="bar c0" x="{_LEFT + at * width:.1f}" y="{top}" width="{width:.1f}" '
                    f'height="{_CELL - 1}" fill-opacity="{min(max(value / darkest, 0.04), 1):.3f}">'
                    f"<title>{escape(f'{name}, {at}: {_told(value, darkest)}')}</title></rect>"
                )
    for at in range(0, columns, max(1, columns // 10)):
        parts.append(
            f'<text class="tick" x="{_LEFT + (at + 0.5) * width:.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{at}</text>"
        )
    return Chart(parts, [], title, bottom + 46)


def _told(value: float, darkest: float) -> str:
    return f"{value:.3f}" if darkest == 1.0 else f"{value:.4g}"


def svg_file(charts: Sequence[Chart]) -> str:
    """Charts below each other in one SVG file that needs no page: title, picture, key."""
    parts: list[str] = []
    top = 10
    for chart in charts:
        name = escape(chart.title)
        parts.append(f'<text class="name" x="{_WIDTH / 2}" y="{top + 14}" text-anchor="middle">{name}</text>')
        parts.append(f'<g transform="translate(0 {top + 20})">{"".join(chart.parts)}</g>')
        top += 20 + chart.height
        column = 34 + _LETTER * max(map(len, chart.names), default=0)
        columns = max(1, int((_WIDTH - _LEFT) / column))
        for number, name in enumerate(chart.names):
            x, y = _LEFT + number % columns * column, top + 6 + 18 * (number // columns)
            parts.append(f'<rect class="bar c{number % len(_PALETTE)}" x="{x:.0f}" y="{y}" width="11" height="11"/>')
            parts.append(f'<text x="{x + 16:.0f}" y="{y + 10}">{escape(name)}</text>')
        top += 18 * -(-len(chart.names) // columns) + 18
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" width="{_WIDTH}" height="{top}">'
        f'<style>{_FILE_STYLE}</style><rect width="{_WIDTH}" height="{top}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


_FILE_STYLE = (
    "text { font: 12px sans-serif; fill: #1b1f24; } .tick, .axis { fill: #5b6570; } .name { font-size: 14px; }"
    ".grid { stroke: #d9dee3; } .line { fill: none; stroke-width: 2; } .level { stroke: #1b1f24; }"
    ".front { fill: none; stroke: #5b6570; stroke-dasharray: 5 4; } .disc { fill-opacity: 0.7; }"
    + "".join(
        f".line.c{number} {{ stroke: {colour}; }} .dot.c{number}, .bar.c{number} {{ fill: {colour}; }}"
        for number, colour in enumerate(_PALETTE)
    )
)


def _frame(title: str, x_label: str, y_label: str) -> str:
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    return (
        f"<title>{escape(title)}</title>"
        f'<text class="axis" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="axis" x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">'
        f"{escape(y_label)}</text>"
    )


def _x_tick(x: float, label: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{escape(label)}</text>'


def _y_tick(y: float, label: str) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'
    )


def _shorten(text: str, slot: float) -> str:
    """Cut to the width of a group; the whole name is in its bars' hover texts and in the table beside."""
    room = max(3, int(slot * (_WIDTH - _LEFT - _RIGHT) / _LETTER))
    return text if len(text) <= room else f"{text[: room - 1]}\u2026"


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _share(value: float, axis: Sequence[float]) -> float:
    return (value - axis[0]) / (axis[-1] - axis[0])


def _ticks(low: float, high: float, smallest: float = 0.0) -> list[float]:
    """Round numbers that cover the range, about five of them, at least ``smallest`` apart."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / 5))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 6)
    step = max(step, smallest)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        last += 1
    return [round(number * step, 12) for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten that cover the range; every power alone when it spans many."""
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    marks = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        for factor in factors
    ]
    start = max(at for at, mark in enumerate(marks) if mark <= low)
    end = min(at for at, mark in enumerate(marks) if mark >= high and at > start)
    return marks[start : end + 1]
