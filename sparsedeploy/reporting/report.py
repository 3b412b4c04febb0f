"""The report of a pipeline run: one dictionary, shown as a terminal table and as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from rich.table import Table

from sparsedeploy.reporting.charts import Bar, Series, bar_chart, line_chart

FORMAT = 1


def layer_sparsity(plan: Mapping[str, Any]) -> list[float]:
    """The parameter-weighted sparsity of each decoder layer of a plan (as plain data), by depth."""
    totals: dict[int, list[int]] = {}
    for module in plan["modules"]:
        depth = next(int(part) for part in module["name"].split(".") if part.isdigit())
        total = totals.setdefault(depth, [0, 0])
        total[0] += module["rows"] * module["zeros_per_row"]
        total[1] += module["rows"] * module["columns"]
    return [zeros / size for _, (zeros, size) in sorted(totals.items())]


def summary_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a model: quality, size and speed side by side, as plain figures."""
    speed = {row["name"]: row for row in report["benchmark"]["rows"]}
    rows = []
    for model in report["models"]:
        measured = speed[model["name"]]
        rows.append(
            {
                "model": model["name"],
                "sparsity": model["sparsity"],
                "perplexity": model["quality"]["perplexity"],
                "nonzero_millions": model["nonzero_weights"] / 1e6,
                "size_mb": model["artifact_bytes"] / 1e6,
                "prefill_ms": measured["prefill_ms"]["median"],
                "prefill_speedup": measured["prefill_speedup"],
                "decode_ms": measured["decode_ms"]["median"],
                "decode_speedup": measured["decode_speedup"],
                "decode_limit": None if measured["baseline"] else measured["decode_limit"],
            }
        )
    return rows


_HEADERS = ("model", "sparsity", "perplexity", "size", "non-zero", "prefill", "ms", "decode", "ms", "limit")
# The terminal's eighty columns have no room for the rest; the files have it.
_NARROW = ("model", "sparsity", "perplexity", "size", "prefill", "decode", "limit")


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["model"],
        f"{row['sparsity']:.0%}",
        f"{row['perplexity']:.2f}",
        f"{row['size_mb']:.1f} MB",
        f"{row['nonzero_millions']:.2f} M",
        _times(row["prefill_speedup"]),
        f"{row['prefill_ms']:.2f}",
        _times(row["decode_speedup"]),
        f"{row['decode_ms']:.2f}",
        "" if row["decode_limit"] is None else f"{row['decode_limit']:.2f}x",
    )


def _times(speedup: Mapping[str, float] | None) -> str:
    """The median, with a question mark where the middle half of the rounds lies on both sides of 1."""
    if speedup is None:
        return "1x"
    return f"{speedup['median']:.2f}x" + ("?" if speedup["low"] <= 1 <= speedup["high"] else "")


def summary_table(report: Mapping[str, Any]) -> Table:
    """The table that the terminal shows: prefill and decode as speedups over the dense model."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for at, header in enumerate(_NARROW):
        table.add_column(header, justify="left" if at == 0 else "right", no_wrap=True)
    for row in summary_rows(report):
        cells = dict(zip(_HEADERS, _cells(row), strict=True))
        table.add_row(*(cells[header] for header in _NARROW))
    return table


def summary_markdown(report: Mapping[str, Any]) -> str:
    """The same table in Markdown."""
    lines = [f"| {' | '.join(_HEADERS)} |", "|---|" + "---:|" * (len(_HEADERS) - 1)]
    lines += [f"| {' | '.join(_cells(row))} |" for row in summary_rows(report)]
    return "\n".join(lines) + "\n"


def heading(report: Mapping[str, Any]) -> str:
    """One line: where and how the speed was measured."""
    measured = report["benchmark"]
    options = measured["options"]
    return (
        f"{options['runtime']} on {options['cores']} cores of {measured['machine']['processor']}, "
        f"{options['rounds']} interleaved rounds, prompt {options['prompt_length']} tokens, "
        f"memory bandwidth {measured['bandwidth']['best']:.1f} GB/s"
    )


def html_report(report: Mapping[str, Any]) -> str:
    """The report as one HTML file without scripts or links to anything outside it."""
    quality = report["models"][0]["quality"]
    sections = [
        _section(
            "Quality, size and speed",
            _table(_HEADERS, [_cells(row) for row in summary_rows(report)])
            + _note(
                f"{heading(report)}. Perplexity: {quality['data']} ({quality['split']} split), {quality['windows']} "
                f"windows of {quality['context']} tokens. Prefill and decode: speedup over dense, the median of "
                "the rounds' ratios; a question mark where the rounds disagree on which is faster. "
                "Limit: the highest decode speedup that memory traffic alone would allow. Size: the exported folder; "
                "the engine compresses zeros when it loads the graph, not on disk."
            ),
        ),
        _section("Speedup over the dense model", _speed_chart(report) + _note(_WHISKERS)),
        _section("Perplexity and sparsity", _quality_chart(report)),
        _layers_section(report),
        _section("Notes on the measurement", _list(report["benchmark"]["notes"] or ["None."])),
        _section("Settings", _pairs(report["settings"])),
        _section("Machine", _pairs(_environment(report))),
        _section("Repeat it", _commands(report)),
    ]
    body = "\n".join(section for section in sections if section)
    title = escape(report["title"])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


_WHISKERS = "Thin lines: the middle half of the rounds. Dashes: the byte limit of decoding. Line at 1: the dense model."


def _speed_chart(report: Mapping[str, Any]) -> str:
    rows = [row for row in report["benchmark"]["rows"] if not row["baseline"]]

    def bars(phase: str) -> list[Bar]:
        return [
            Bar(
                row[f"{phase}_speedup"]["median"],
                row[f"{phase}_speedup"]["low"],
                row[f"{phase}_speedup"]["high"],
                row["decode_limit"] if phase == "decode" else None,
            )
            for row in rows
        ]

    return bar_chart(
        [row["name"] for row in rows],
        {"prefill": bars("prefill"), "decode": bars("decode")},
        title="Speedup over the dense model, prefill and decode",
        y_label="speedup",
        line_at=1.0,
    )


def _quality_chart(report: Mapping[str, Any]) -> str:
    points = sorted((model["sparsity"], model["quality"]["perplexity"]) for model in report["models"])
    return line_chart(
        [Series("perplexity (lower is better)", points)],
        title="Perplexity against sparsity",
        x_label="sparsity",
        y_label="perplexity, log scale",
        log_y=True,
    )


def _layers_section(report: Mapping[str, Any]) -> str:
    lines = [
        Series(model["name"], list(enumerate(model["layer_sparsity"])))
        for model in report["models"]
        if model["layer_sparsity"]
    ]
    if not lines:
        return ""
    chart = line_chart(
        lines, title="Sparsity by decoder layer", x_label="decoder layer", y_label="sparsity", whole_x=True
    )
    return _section("Where the zeros are", chart)


def _environment(report: Mapping[str, Any]) -> dict[str, Any]:
    measured = report["benchmark"]
    facts = dict(measured["machine"])
    facts.pop("flags", None)
    runtime = next(iter(measured["runtime"].values()))
    return {
        **facts,
        "measured bandwidth": f"{measured['bandwidth']['best']:.1f} GB/s",
        "runtime versions": ", ".join(f"{name} {version}" for name, version in runtime["versions"].items()),
        "sparsedeploy": report["sparsedeploy"],
        "started": measured["started"],
    }


def _commands(report: Mapping[str, Any]) -> str:
    lines = [report["command"], *report["commands"]]
    return f"<pre>{escape(chr(10).join(lines))}</pre>" + _note("Every figure is in report.json beside this file.")


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _list(items: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _pairs(values: Mapping[str, Any]) -> str:
    return _table(("setting", "value"), [(str(key), str(value)) for key, value in values.items()], numbers=False)


def _table(headers: tuple[str, ...], rows: list[tuple[str, ...]], *, numbers: bool = True) -> str:
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = "numbers" if numbers else "pairs"
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5b6570; --page: #fff; --line: #d9dee3; --soft: #f4f6f8;
  --c0: #2563b8; --c1: #d0651d; --c2: #2a8a4a; --c3: #8a3fa0; --c4: #b08900; --c5: #c0304f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --dim: #9aa4ae; --page: #14171a; --line: #333a41;
  --soft: #1d2226; --c0: #6ea8f0; --c1: #f0975a; --c2: #63c585; --c3: #c58ad8; --c4: #e0bd45; --c5: #f07a93; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 1rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--dim); font-weight: 600; font-size: .85rem; }
.numbers td, .numbers th { white-space: nowrap; }
.numbers td + td, .numbers th + th { text-align: right; } .pairs td + td { overflow-wrap: anywhere; }
.note { color: var(--dim); font-size: .87rem; } svg { display: block; width: 100%; max-width: 44rem; height: auto; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .85rem; }
svg text { fill: var(--ink); font-size: 12px; } svg .tick, svg .axis { fill: var(--dim); }
.grid { stroke: var(--line); } .line { fill: none; stroke-width: 2; }
.whisker { stroke: var(--ink); stroke-width: 1.5; }
.level { stroke: var(--ink); stroke-width: 1; } .limit { stroke: var(--ink); stroke-width: 2; stroke-dasharray: 4 3; }
.line.c0 { stroke: var(--c0); } .line.c1 { stroke: var(--c1); } .line.c2 { stroke: var(--c2); }
.line.c3 { stroke: var(--c3); } .line.c4 { stroke: var(--c4); } .line.c5 { stroke: var(--c5); }
.dot.c0, .bar.c0 { fill: var(--c0); } .dot.c1, .bar.c1 { fill: var(--c1); } .dot.c2, .bar.c2 { fill: var(--c2); }
.dot.c3, .bar.c3 { fill: var(--c3); } .dot.c4, .bar.c4 { fill: var(--c4); } .dot.c5, .bar.c5 { fill: var(--c5); }
"""
