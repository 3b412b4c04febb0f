"""A benchmark's result for people: tables for the terminal and in Markdown, prefill and decode apart."""

from __future__ import annotations

from rich.table import Table

from sparsedeploy.evaluation.benchmark import BenchmarkResult, Row, Summary

_PREFILL_HEADERS = ("artifact", "sparsity", "ms", "tokens/s", "speedup", "middle half")
_DECODE_HEADERS = (*_PREFILL_HEADERS, "limit", "read ms")
_LEGEND = (
    "Medians of the rounds. speedup: median of the rounds' ratios to the baseline, and their middle half. "
    "limit: the highest decode speedup that memory traffic alone would allow. "
    "read ms: what reading the weights once takes at the measured bandwidth."
)


def benchmark_tables(result: BenchmarkResult) -> list[Table]:
    """The tables that ``sparsedeploy bench`` prints, one for prefill and one for decode."""
    tables = []
    for title, headers, rows in _parts(result):
        table = Table(title=title, box=None, padding=(0, 2, 0, 0), title_justify="left", title_style="bold")
        for at, header in enumerate(headers):
            table.add_column(header, justify="left" if at == 0 else "right", no_wrap=at != 0, overflow="fold")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def benchmark_heading(result: BenchmarkResult) -> str:
    """One line: engine, cores, processor, lengths and memory bandwidth."""
    options = result.options
    version = next(iter(result.runtime.values()))["versions"].get(options.runtime, "")
    cores = f"{options.cores} core{'s' if options.cores > 1 else ''}"
    return (
        f"{options.runtime} {version}, {cores} of {result.machine.processor}, {options.rounds} rounds, "
        f"memory bandwidth {result.bandwidth.best:.1f} GB/s"
    )


def benchmark_legend(result: BenchmarkResult) -> list[str]:
    """How to read the figures, then the notes of this result."""
    return [_LEGEND, *(f"note: {note}" for note in result.notes)]


def benchmark_markdown(result: BenchmarkResult) -> str:
    """Heading, tables and notes as Markdown."""
    lines = [benchmark_heading(result), ""]
    for title, headers, rows in _parts(result):
        lines.extend([f"**{title}**", "", f"| {' | '.join(headers)} |", "|---|" + "---:|" * (len(headers) - 1)])
        lines.extend(f"| {' | '.join(row)} |" for row in rows)
        lines.append("")
    lines.extend([_LEGEND, ""])
    lines.extend(f"- {note}" for note in result.notes)
    return "\n".join(lines).rstrip() + "\n"


def _parts(result: BenchmarkResult) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    options = result.options
    prefill = f"Prefill of {options.prompt_length} tokens, {options.prompt_chunk} at once"
    decode = f"Decode, one token at a time after {options.prompt_length} tokens"
    return [
        (prefill, _PREFILL_HEADERS, [_prefill_cells(row) for row in result.rows]),
        (decode, _DECODE_HEADERS, [_decode_cells(row) for row in result.rows]),
    ]


def _prefill_cells(row: Row) -> tuple[str, ...]:
    return _cells(row, row.prefill_ms, row.prefill_tokens_per_second, row.prefill_speedup)


def _decode_cells(row: Row) -> tuple[str, ...]:
    cells = _cells(row, row.decode_ms, row.decode_tokens_per_second, row.decode_speedup)
    return (*cells, "" if row.baseline else f"{row.decode_limit:.2f}x", f"{row.read_ms:.2f}")


def _cells(row: Row, time: Summary, rate: float, speedup: Summary | None) -> tuple[str, ...]:
    return (
        f"{row.name} (baseline)" if row.baseline else row.name,
        f"{row.sparsity:.1%}",
        f"{time.median:.2f}",
        f"{rate:.1f}",
        "" if speedup is None else f"{speedup.median:.2f}x",
        "" if speedup is None else f"{speedup.low:.2f}-{speedup.high:.2f}",
    )
