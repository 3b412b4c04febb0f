"""The parts of a self-contained HTML page: no script, no network, light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any


def page(title: str, sections: Iterable[str]) -> str:
    """A whole page; empty sections are left out."""
    heading = escape(title)
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{heading}</h1>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *content: str) -> str:
    """A part with a heading of its own."""
    return f"<section><h2>{escape(title)}</h2>{''.join(content)}</section>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def items(texts: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def figure(chart: str, caption: str, commands: Sequence[str] = ()) -> str:
    """A chart with its caption and the commands that repeat it."""
    again = commands_block(commands) if commands else ""
    return f"<figure>{chart}<figcaption>{escape(caption)}</figcaption>{again}</figure>"


def commands_block(commands: Sequence[str]) -> str:
    """Commands to copy."""
    return f'<pre class="again">{escape(chr(10).join(commands))}</pre>'


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """A table; with ``numbers`` all but the first column are aligned right.

    A row of a single cell is a heading of the rows after it.
    """
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    lines = []
    for row in rows:
        if len(row) == 1 and len(headers) > 1:
            lines.append(f'<tr class="group"><th colspan="{len(headers)}">{escape(row[0])}</th></tr>')
        else:
            lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    kind = "numbers" if numbers else "pairs"
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def pairs(values: Mapping[str, Any]) -> str:
    """A table of names and values."""
    return table(("setting", "value"), [(key, _text(value)) for key, value in values.items()], numbers=False)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5b6570; --page: #fff; --line: #d9dee3; --soft: #f4f6f8;
  --c0: #2563b8; --c1: #d0651d; --c2: #2a8a4a; --c3: #8a3fa0; --c4: #b08900; --c5: #c0304f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --dim: #9aa4ae; --page: #14171a; --line: #333a41;
  --soft: #1d2226; --c0: #6ea8f0; --c1: #f0975a; --c2: #63c585; --c3: #c58ad8; --c4: #e0bd45; --c5: #f07a93; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 1rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
h2, p, li, figcaption { overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--dim); font-weight: 600; font-size: .85rem; }
.group th { color: var(--ink); background: var(--soft); }
.numbers td, .numbers th { white-space: nowrap; }
.numbers td + td, .numbers th + th { text-align: right; } .pairs td + td { overflow-wrap: anywhere; }
.note, figcaption { color: var(--dim); font-size: .87rem; }
figure { margin: 1rem 0; } .chart { display: block; width: 100%; max-width: 46rem; height: auto; }
.key { font-size: .85rem; margin: .2rem 0 .5rem; } .key span { margin-right: 1rem; overflow-wrap: anywhere; }
.swatch { width: .75rem; height: .75rem; margin-right: .35rem; }
pre { background: var(--soft); padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .8rem; margin: .5rem 0; }
svg text { fill: var(--ink); font-size: 12px; }
@media (max-width: 40rem) { svg text { font-size: 17px; } }
 svg .tick, svg .axis { fill: var(--dim); }
.grid { stroke: var(--line); } .line { fill: none; stroke-width: 2; }
.whisker { stroke: var(--ink); stroke-width: 1.5; }
.level { stroke: var(--ink); stroke-width: 1; } .limit { stroke: var(--ink); stroke-width: 2; stroke-dasharray: 4 3; }
.front { fill: none; stroke: var(--dim); stroke-dasharray: 5 4; }
.line.c0 { stroke: var(--c0); } .line.c1 { stroke: var(--c1); } .line.c2 { stroke: var(--c2); }
.line.c3 { stroke: var(--c3); } .line.c4 { stroke: var(--c4); } .line.c5 { stroke: var(--c5); }
.dot.c0, .bar.c0 { fill: var(--c0); } .dot.c1, .bar.c1 { fill: var(--c1); } .dot.c2, .bar.c2 { fill: var(--c2); }
.dot.c3, .bar.c3 { fill: var(--c3); } .dot.c4, .bar.c4 { fill: var(--c4); } .dot.c5, .bar.c5 { fill: var(--c5); }
.disc { fill-opacity: .75; stroke: var(--page); }
"""
