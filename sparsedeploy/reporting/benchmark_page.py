"""A benchmark's result as one HTML page, and its sections for a larger report."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from sparsedeploy.conversion import typed_words
from sparsedeploy.reporting.benchmark_table import (
    LEGEND,
    PHASES,
    PROFILE_HEADERS,
    SIZE_HEADERS,
    benchmark_heading,
    profile_rows,
    profile_title,
    rows_at,
    runtime_versions,
    sections,
    setting_title,
    settings,
    size_rows,
)
from sparsedeploy.reporting.charts import Bar, Series, bar_chart, line_chart
from sparsedeploy.reporting.page import commands_block, figure, items, note, page, pairs, section, table
from sparsedeploy.speed.options import BenchmarkOptions

_WHISKERS = (
    "Thin lines: 95 % intervals. Dashes: the byte limit of decoding. Line at 1: the baseline. Failed measurements are "
    "not drawn."
)
_SPEED_HEADERS = ("", "sparsity", "ms", "tokens/s", "speedup", "95 % interval", "limit")


def benchmark_page(result: Mapping[str, Any], title: str = "sparsedeploy bench") -> str:
    """The whole page of a result (plain data)."""
    return page(
        title,
        [
            note(benchmark_heading(result)),
            notes_section(result),
            *speed_sections(result),
            sizes_section(result),
            *profile_sections(result),
            section("Settings", pairs({key: value for key, value in result["options"].items() if value is not None})),
            environment_section(result),
            section("Repeat it", commands_block([repeat_command(result)]), note(LEGEND)),
        ],
    )


def repeat_command(result: Mapping[str, Any]) -> str:
    """The command that measures the same again."""
    options = {**result["options"], "profile": bool(result["profiles"])}
    chunks = set(options["prompt_chunks"].values())
    options["chunk"] = next(iter(chunks)) if len(chunks) == 1 else None
    return shlex.join(["sparsedeploy", "bench", *options["artifacts"], *typed_words(BenchmarkOptions, options)])


def notes_section(result: Mapping[str, Any]) -> Markup:
    return section("Notes on the measurement", items(result["notes"] or ["None."]))


def speed_sections(result: Mapping[str, Any]) -> Iterator[Markup]:
    """For each setting a chart of speedups with intervals, and the table."""
    for setting in settings(result):
        rows = rows_at(result, setting)
        lines: list[tuple[str, ...]] = []
        for title, cells in sections(rows):
            lines.append((title,))
            lines.extend(cells)
        yield section(
            f"Speed: {setting_title(setting, result)}",
            _speed_chart(result, rows, setting_title(setting, result)),
            table(_SPEED_HEADERS, lines),
        )


def sizes_section(result: Mapping[str, Any]) -> Markup:
    return section("Size, loading and memory", table(SIZE_HEADERS, size_rows(result)))


def profile_sections(result: Mapping[str, Any]) -> Iterator[Markup]:
    """Time by layer beside each layer's sparsity, for each phase that some engine has profiled."""
    for phase in ("prefill", "decode"):
        found = [one for one in result["profiles"] if one["phase"] == phase and one["reason"] is None]
        if not found:
            continue
        lines = [
            Series(one["name"], [(int(part["part"]), part["ms"]) for part in one["parts"] if part["part"].isdigit()])
            for one in found
        ]
        chart = line_chart(
            lines, title=f"Time by decoder layer, {phase}", x_label="decoder layer", y_label="ms", whole_x=True
        )
        caption = f"The engine's own times: {found[0]['what']}. The minimum of several profiled runs."
        tables = Markup("").join(
            note(profile_title(one)) + table(PROFILE_HEADERS, profile_rows(one, result)) for one in found
        )
        kinds = Markup("").join(
            note(f"{one['name']}: most expensive kinds of operators")
            + table(
                ("kind", "operators", "ms"),
                [(kind["kind"], str(kind["count"]), f"{kind['ms']:.3f}") for kind in one["kinds"][:6]],
            )
            for one in found
        )
        yield section(f"Time by layer, {phase}", figure(chart, caption, [repeat_command(result)]), tables, kinds)


def environment(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the machine and the runtimes were, by name."""
    facts = {key.replace("_", " "): value for key, value in result["machine"].items() if value is not None}
    facts["flags"] = " ".join(facts["flags"])
    for cores, one in result["bandwidth"].items():
        facts[f"measured bandwidth, {cores} thread{'s' if int(cores) > 1 else ''}"] = (
            f"{one['best']:.1f} GB/s (best copy {max(one['copy']):.1f}, best read {max(one['read']):.1f})"
        )
    facts["load average at the start"] = result["load_average"]
    facts["cores busy with other work at the start"] = f"{result['busy_cores']:.1f}"
    facts["runtimes"] = "; ".join(runtime_versions(result))
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    facts["started"] = result["started"]
    return facts


def environment_section(result: Mapping[str, Any]) -> Markup:
    return section("Environment", pairs(environment(result)))


def _speed_chart(result: Mapping[str, Any], rows: list[dict[str, Any]], title: str) -> Markup:
    shown = [row for row in rows if row["status"] == "measured" and row["total"]["speedup"] is not None]
    if not shown:
        return note("No speedups in this setting.")
    series = {
        name: [
            Bar(
                row[phase]["speedup"]["median"],
                row[phase]["speedup"]["low"],
                row[phase]["speedup"]["high"],
                row["decode_limit"] if phase == "decode" else None,
            )
            for row in shown
        ]
        for phase, name in PHASES.items()
    }
    chart = bar_chart(
        [row["name"] for row in shown],
        series,
        title=f"Speedup over the baseline, {title}",
        y_label="speedup",
        line_at=1.0,
    )
    return figure(chart, _WHISKERS, [repeat_command(result)])
