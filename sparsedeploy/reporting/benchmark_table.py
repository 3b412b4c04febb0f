"""A benchmark's result for people: tables for the terminal and in Markdown.

Everything here reads the result as plain data (``BenchmarkResult.to_json()``), so a saved file can be shown too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

PHASES = {"prefill": "prefill", "decode": "decode", "total": "end to end"}
_HEADERS = ("", "sparse", "ms", "tokens/s", "speedup", "95 % interval", "limit")
SIZE_HEADERS = ("", "runtime", "on disk", "load", "peak memory", "read")
PROFILE_HEADERS = ("", "sparse", "ms", "share", "linear ms", "kernels", "speedup")
LEGEND = (
    "prefill: the time to the first new token. decode: one token. end to end: the prompt and all new tokens. Times are "
    "medians of the rounds. speedup: the median of the rounds' ratios to the baseline, with its 95 % bootstrap "
    "interval; '?' where it includes 1. *: rounds far from the median (outliers). limit: the highest decode "
    "speedup that memory traffic alone would allow. read: reading the weights once at the measured bandwidth."
)


def settings(result: Mapping[str, Any]) -> list[dict[str, int]]:
    """The settings in the order measured."""
    found: list[dict[str, int]] = []
    for row in result["rows"]:
        if row["setting"] not in found:
            found.append(row["setting"])
    return found


def rows_at(result: Mapping[str, Any], setting: Mapping[str, int]) -> list[dict[str, Any]]:
    """The rows of one setting."""
    return [row for row in result["rows"] if row["setting"] == setting]


def setting_title(setting: Mapping[str, int], result: Mapping[str, Any]) -> str:
    cores = f"{setting['cores']} core{'s' if setting['cores'] > 1 else ''}"
    new = result["options"]["decode_tokens"]
    return f"prompt {setting['prompt_length']}, then {new} tokens, {cores}, batch {setting['batch']}"


def label(row: Mapping[str, Any]) -> str:
    return f"{row['name']} (baseline)" if row["baseline"] else str(row["name"])


def times(speedup: Mapping[str, Any] | None) -> str:
    """The median, with '?' where the interval includes 1."""
    if speedup is None:
        return ""
    return f"{speedup['median']:.2f}x" + ("?" if speedup["low"] <= 1 <= speedup["high"] else "")


def interval(speedup: Mapping[str, Any] | None) -> str:
    return "" if speedup is None else f"{speedup['low']:.2f}-{speedup['high']:.2f}"


def benchmark_tables(result: Mapping[str, Any]) -> list[Table]:
    """The tables that ``sparsedeploy bench`` prints: one for each setting, and one of sizes."""
    tables = []
    for title, sections in _parts(result):
        table = _table(title, _HEADERS)
        for phase, rows in sections:
            table.add_row(Text(phase, style="bold"))
            for row in rows:
                table.add_row(f" {row[0]}", *row[1:])
        tables.append(table)
    sizes = _table("sizes", SIZE_HEADERS)
    for row in size_rows(result):
        sizes.add_row(*row)
    return [*tables, sizes, *(profile_table(one, result) for one in result["profiles"] if one["reason"] is None)]


def benchmark_heading(result: Mapping[str, Any]) -> str:
    """Runtimes, processor, rounds and memory bandwidth."""
    machine = result["machine"]
    governor = machine.get("frequency_governor")
    bandwidth = ", ".join(
        f"{one['best']:.1f} GB/s with {cores} thread{'s' if int(cores) > 1 else ''}"
        for cores, one in result["bandwidth"].items()
    )
    return (
        f"{machine['processor']}{f' (governor {governor})' if governor else ''}, {result['options']['rounds']} "
        f"interleaved rounds, memory {bandwidth}. {'; '.join(runtime_versions(result))}"
    )


def runtime_versions(result: Mapping[str, Any]) -> list[str]:
    """Each runtime with the versions that it reported."""
    found = {}
    for row in result["rows"]:
        facts = result["runtime"].get(row["name"])
        if facts is not None:
            versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
            found[row["runtime"]] = f"{row['runtime']}: {versions}"
    return list(found.values())


def benchmark_legend(result: Mapping[str, Any]) -> list[str]:
    """How to read the figures, then the notes of this result."""
    return [LEGEND, *(f"note: {note}" for note in result["notes"])]


def benchmark_markdown(result: Mapping[str, Any]) -> str:
    """Heading, tables and notes as Markdown."""
    lines = [benchmark_heading(result), ""]
    for title, sections in _parts(result):
        lines.extend([f"**{title}**", "", f"| {' | '.join(_HEADERS)} |", "|---|" + "---:|" * (len(_HEADERS) - 1)])
        for phase, rows in sections:
            lines.extend(f"| {phase}, {' | '.join(row)} |" for row in rows)
        lines.append("")
    lines.extend([f"| {' | '.join(SIZE_HEADERS)} |", "|---|" + "---:|" * (len(SIZE_HEADERS) - 1)])
    lines.extend(f"| {' | '.join(row)} |" for row in size_rows(result))
    lines.extend(["", LEGEND, ""])
    lines.extend(f"- {note}" for note in result["notes"])
    return "\n".join(lines).rstrip() + "\n"


def phase_cells(row: Mapping[str, Any], phase: str) -> tuple[str, ...]:
    """One line of a table: name, sparsity, time, rate, speedup, interval, limit; a failed row has its status."""
    name, sparsity = label(row), f"{row['sparsity']:.0%}"
    if row["status"] != "measured":
        return (name, sparsity, row["status"], "", "", "", "")
    figures = row[phase]
    outliers = len(figures["ms"]["outliers"])
    return (
        name,
        sparsity,
        f"{figures['ms']['median']:.2f}{'*' if outliers else ''}",
        f"{figures['tokens_per_second']:.0f}",
        times(figures["speedup"]),
        interval(figures["speedup"]),
        f"{row['decode_limit']:.2f}x" if phase == "decode" and not row["baseline"] else "",
    )


def size_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """One line for each candidate: its first measured setting's load time, its highest peak of memory."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        by_name.setdefault(row["name"], []).append(row)
    for rows in by_name.values():
        peaks = [row["peak_memory_bytes"] for row in rows if row["peak_memory_bytes"]]
        loads = [row["load_seconds"] for row in rows if row["load_seconds"] is not None]
        yield (
            label(rows[0]),
            rows[0]["runtime"],
            f"{rows[0]['artifact_bytes'] / 1e6:.1f} MB",
            f"{loads[0]:.1f} s" if loads else "",
            f"{max(peaks) / 1e6:.0f} MB" if peaks else "",
            f"{rows[0]['read_ms']:.2f} ms",
        )


def profile_title(profile: Mapping[str, Any]) -> str:
    return f"{profile['name']}, {profile['phase']}: {profile['what']}, by {profile['runtime']}'s own profile"


def profile_rows(profile: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """One line for each layer beside its sparsity: all operators, those with weights, sparse kernels, speedup.

    The speedup is over the same part of the baseline's profile, where both have one.
    """
    base = _profile_of_baseline(profile, result)
    for part in profile["parts"]:
        sparsity = f"{part['zeros'] / part['weights']:.0%}" if part["weights"] else ""
        dense = base.get(part["part"])
        yield (
            f"layer {part['part']}" if part["part"].isdigit() else "outside the layers",
            sparsity,
            f"{part['ms']:.3f}",
            f"{part['ms'] / profile['total_ms']:.0%}" if profile["total_ms"] else "",
            f"{part['linear_ms']:.3f}",
            f"{part['sparse_kernels']} of {part['linears']}",
            f"{dense / part['ms']:.2f}x" if dense is not None and part["ms"] > 0 else "",
        )


def profile_table(profile: Mapping[str, Any], result: Mapping[str, Any]) -> Table:
    """Time by layer, then the three most expensive kinds of operators."""
    table = _table(profile_title(profile), PROFILE_HEADERS)
    for row in profile_rows(profile, result):
        table.add_row(*row)
    table.add_row("all", "", f"{profile['total_ms']:.3f}")
    for kind in profile["kinds"][:3]:
        table.add_row(f"  {kind['count']} {kind['kind']}", "", f"{kind['ms']:.3f}")
    return table


def _profile_of_baseline(profile: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, float]:
    """Part -> ms of the baseline in the same phase; empty for the baseline itself or without its profile."""
    base = next(row["name"] for row in result["rows"] if row["baseline"])
    if profile["name"] == base:
        return {}
    for other in result["profiles"]:
        if other["name"] == base and other["phase"] == profile["phase"]:
            return {part["part"]: part["ms"] for part in other["parts"]}
    return {}


def _table(title: str, headers: Sequence[str]) -> Table:
    table = Table(title=title, box=None, padding=(0, 1, 0, 0), title_justify="left", title_style="bold")
    for at, header in enumerate(headers):
        table.add_column(header, justify="left" if at == 0 else "right", no_wrap=at != 0, overflow="fold")
    return table


def _parts(result: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, list[tuple[str, ...]]]]]]:
    """For each setting its title, and for each phase its name and lines; last, what was not measured."""
    return [(setting_title(setting, result), sections(rows_at(result, setting))) for setting in settings(result)]


def sections(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Each phase's name with the cells of the rows that were measured; last, the others, whose reasons are notes."""
    there = [row for row in rows if row["status"] == "measured"]
    parts = [(title, [phase_cells(row, phase) for row in there]) for phase, title in PHASES.items() if there]
    missing = [phase_cells(row, "total") for row in rows if row["status"] != "measured"]
    return [*parts, ("not measured", missing)] if missing else parts
