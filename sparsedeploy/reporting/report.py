"""The report of a pipeline run: one dictionary, shown as a terminal table and as one self-contained HTML file.

``models`` is a list with, for each model, ``name``, ``sparsity``, ``quality`` (``perplexity`` and, when tasks were run,
``tasks``: name -> metrics, each with its ``_stderr``), ``layer_sparsity``, ``allocation`` and ``commands`` (step ->
command line), and where they are known ``modules`` (:func:`.levels.module_rows`) and ``samples``
(:func:`.samples.samples_section`). ``benchmark`` is the result of ``sparsedeploy bench`` under the same names; or
``engines`` is a list with, for each engine, ``engine`` (its name), ``benchmark`` and ``why`` (name -> a sentence on its
speed). ``probe``, where there is one, has a ``title`` and ``engines`` likewise, for a random model that shows speed
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup
from rich.table import Table

from sparsedeploy.reporting.benchmark_page import (
    environment,
    notes_section,
    profile_sections,
    repeat_command,
    sizes_section,
    speed_sections,
)
from sparsedeploy.reporting.benchmark_table import rows_at, setting_title, settings, times
from sparsedeploy.reporting.charts import Disc, Series, line_chart, scatter_chart
from sparsedeploy.reporting.levels import levels_section
from sparsedeploy.reporting.page import commands_block, figure, note, page, pairs, section, table
from sparsedeploy.reporting.samples import samples_section

FORMAT = 3
# The first of these that a task has is its score. The pruning papers report acc for their tasks.
_METRICS = ("acc", "acc_norm", "exact_match")


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
    """One row an engine and model: quality, size and speed side by side, as plain figures, in the first setting.

    Speeds are None for a model that was not measured, quality for the probe's.
    """
    models = {model["name"]: model for model in report["models"]}
    rows = []
    for group, measured in [("", one) for one in engines_of(report)] + [("probe", one) for one in _probes(report)]:
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


def _probes(report: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    found: Sequence[Mapping[str, Any]] = report.get("probe", {}).get("engines", [])
    return found


def _first_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the models in the first engine."""
    first = engines_of(report)[0]["engine"]
    return [row for row in summary_rows(report) if row["engine"] == first and not row["probe"]]


def results(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every benchmark of the report: the models' in each engine, then the probe's."""
    return [one["benchmark"] for one in [*engines_of(report), *_probes(report)]]


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


_HEADERS = (
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
    "why",
)
# The terminal's eighty columns have no room for the rest; the files have it.
_NARROW = ("engine", "model", "perplexity", "size", "prefill", "decode", "limit")


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["engine"],
        row["model"],
        f"{row['sparsity']:.0%}",
        "" if row["perplexity"] is None else f"{row['perplexity']:.2f}",
        f"{row['size_mb']:.1f} MB",
        "" if row["nonzero_millions"] is None else f"{row['nonzero_millions']:.2f} M",
        *_speed_cells(row, "prefill"),
        *_speed_cells(row, "decode"),
        "" if row["decode_limit"] is None else f"{row['decode_limit']:.2f}x",
        row["why"],
    )


def _speed_cells(row: Mapping[str, Any], phase: str) -> tuple[str, str]:
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
        cells = dict(zip(_HEADERS, _cells(row), strict=True))
        group = (row["engine"], row["probe"])
        if before not in (None, group):
            shown.add_row()
        before = group
        shown.add_row(*(cells[header] for header in _NARROW))
    return shown


def summary_markdown(report: Mapping[str, Any]) -> str:
    """The same table in Markdown, with all columns."""
    lines = [f"| {' | '.join(_HEADERS)} |", "|---|---|" + "---:|" * (len(_HEADERS) - 3) + "---|"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in summary_rows(report)]
    return "\n".join(lines) + "\n"


def notes(report: Mapping[str, Any]) -> list[str]:
    """What the terminal prints below the table: how it was measured, and a sentence for each row."""
    lines = ["", heading(engines_of(report)[0]["benchmark"])]
    lines.append("prefill and decode: times faster than dense in the same engine. limit: what memory traffic allows.")
    if _probes(report):
        lines.append(f"probe: {report['probe']['title']}: for speed only, its text means nothing.")
    lines.append("")
    told: dict[str, list[str]] = {}
    for row in summary_rows(report):
        if row["why"] and not row["baseline"]:
            told.setdefault(row["why"], []).append(f"{row['model']} in {row['engine']}")
    lines += [f"{', '.join(rows)}: {sentence}" for sentence, rows in told.items()]
    lines += report.get("skipped", [])
    lines += [f"note: {text}" for result in results(report) for text in result["notes"]]
    return lines


def heading(measured: Mapping[str, Any]) -> str:
    """One line: where and how the speed was measured."""
    setting = settings(measured)[0]
    return (
        f"{measured['machine']['processor']}: {setting_title(setting, measured)}, "
        f"{measured['options']['rounds']} interleaved rounds, "
        f"memory bandwidth {measured['bandwidth'][str(setting['cores'])]['best']:.1f} GB/s"
    )


def html_report(report: Mapping[str, Any]) -> str:
    """The report as one HTML file that is whole without its script and needs nothing outside it."""
    first = engines_of(report)[0]["benchmark"]
    quality = report["models"][0]["quality"]
    lines = []
    if _probes(report):
        lines.append(note(f"Probe: {report['probe']['title']}: for speed only, its text means nothing."))
    lines += [note(text) for text in report.get("skipped", [])]
    summary = section(
        "Quality, size and speed",
        table(_HEADERS, [_cells(row) for row in summary_rows(report)]),
        note(
            f"{heading(first)}. Perplexity: {quality['data']} ({quality['split']} split), {quality['windows']} "
            f"windows of {quality['context']} tokens, in torch. Prefill and decode: speedup over dense in the same "
            "engine, the median of the rounds' ratios; '?' where its 95 % interval includes 1. Limit: the highest "
            "decode speedup that memory traffic alone would allow. Size: the exported folder; some engines compress "
            "zeros when they load the graph, not on disk."
        ),
        *lines,
        commands_block([report["command"]]),
    )
    every = results(report)
    return page(
        report["title"],
        [
            *(note(report[key]) for key in ("about", "summary") if report.get(key)),
            summary,
            levels_section(report, _first_rows(report)),
            _trials_section(report),
            *_pareto_sections(report),
            *(part for measured in every for part in _engine_sections(measured, named=len(every) > 1)),
            _quality_section(report),
            _tasks_section(report),
            samples_section(report),
            _layers_section(report),
            *_allocation_sections(report),
            section("Settings", pairs(report["settings"])),
            section("Environment", pairs({**environment(first), "sparsedeploy": report["sparsedeploy"]})),
            section(
                "Repeat it",
                commands_block([report["command"], *report["commands"], *map(repeat_command, every)]),
                note("Every figure is in report.json beside this file."),
            ),
        ],
    )


def _trials_section(report: Mapping[str, Any]) -> Markup:
    """What a search tried, with its bound; empty where nothing was searched."""
    trials, bound = report.get("trials", []), float(report.get("bound", 0.0))
    if not trials:
        return Markup("")
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in trials:
        if one["perplexity"] is not None:
            lines.setdefault(f"{one['method']}, {one['allocation']}", []).append((one["rate"], one["perplexity"]))
    series = [Series(name, sorted(points)) for name, points in lines.items()]
    rates = [one["rate"] for one in trials]
    series.append(Series("bound", [(min(rates), bound), (max(rates), bound)]))
    chart = line_chart(
        series, title="Rates that were tried", x_label="sparsity", y_label="perplexity, log scale", log_y=True
    )
    rows = [
        (
            f"{one['method']}, {one['allocation']}",
            f"{one['rate']:.0%}",
            one["reason"] or f"{one['perplexity']:.3f}",
            "yes" if one["perplexity"] is not None and one["perplexity"] <= bound else "no",
            f"{one['seconds']:.0f} s",
        )
        for one in trials
    ]
    headers = ("method and allocation", "sparsity", "perplexity", "within the bound", "time")
    return section(
        "Rates that were tried",
        figure(chart, f"Perplexity on held-out text in PyTorch; the bound is {bound:.3f}."),
        table(headers, rows),
    )


def _engine_sections(measured: Mapping[str, Any], *, named: bool) -> Iterator[Markup]:
    """What was measured in one engine, under a heading where there are several."""
    if named:
        runtimes = ", ".join(dict.fromkeys(row["runtime"] for row in measured["rows"]))
        yield section(f"In {runtimes}: {', '.join(dict.fromkeys(row['name'] for row in measured['rows']))}")
    yield from speed_sections(measured)
    yield from profile_sections(measured)
    yield sizes_section(measured)
    yield notes_section(measured)


def _pareto_sections(report: Mapping[str, Any]) -> Iterator[Markup]:
    """Quality against decode speedup, the area of a mark for the size on disk: by perplexity, and by accuracy."""
    first = engines_of(report)[0]
    rows = [row for row in _first_rows(report) if row["decode_ms"] is not None]
    for key, title, lower in (("perplexity", "perplexity", True), ("accuracy", "mean accuracy of the tasks", False)):
        discs = [
            Disc(
                row["model"],
                1.0 if row["baseline"] else row["decode_speedup"]["median"],
                row[key],
                row["size_mb"],
                f", {row['size_mb']:.1f} MB",
            )
            for row in rows
            if row[key] is not None
        ]
        if len(discs) < 2:
            continue
        chart = scatter_chart(
            discs,
            title=f"{title.capitalize()} against decode speedup",
            x_label="decode speedup over the dense model",
            y_label=f"{title}{', log scale' if lower else ''}",
            log_y=lower,
            lower_is_better=lower,
        )
        caption = (
            f"Right and {'down' if lower else 'up'} is better. Dashed: the Pareto front. "
            "The area of a mark is the size on disk."
        )
        again = [*_step(report, "eval"), repeat_command(first["benchmark"])]
        yield section(f"{title.capitalize()} against speed", figure(chart, caption, again))


def _quality_section(report: Mapping[str, Any]) -> Markup:
    points: dict[str | None, list[tuple[float, float]]] = {}
    for model in report["models"]:
        points.setdefault(model.get("allocation"), []).append((model["sparsity"], model["quality"]["perplexity"]))
    dense = points.pop(None, [])
    lines = [Series(f"{name} allocation", sorted(dense + found)) for name, found in points.items()]
    chart = line_chart(
        lines or [Series("perplexity", sorted(dense))],
        title="Perplexity against sparsity",
        x_label="sparsity",
        y_label="perplexity, log scale",
        log_y=True,
    )
    rows = [
        (model["name"], f"{model['sparsity']:.1%}", f"{model['quality']['perplexity']:.3f}")
        for model in report["models"]
    ]
    shown = figure(chart, "Perplexity on held-out text; lower is better.", _step(report, "eval"))
    return section("Perplexity and sparsity", shown, table(("model", "sparsity", "perplexity"), rows))


def _tasks_section(report: Mapping[str, Any]) -> Markup:
    """Scores with their standard errors; empty when no model was run on tasks."""
    names = list(dict.fromkeys(name for model in report["models"] for name in model["quality"].get("tasks") or {}))
    if not names:
        return Markup("")
    rows = []
    for model in report["models"]:
        tasks = model["quality"].get("tasks") or {}
        mean = accuracy(tasks)
        rows.append((model["name"], *(_score_cell(tasks.get(name)) for name in names), _percent(mean)))
    text = "Percent, with the standard error; acc is what the pruning papers report."
    headers = [f"{name} ({_metric_of(report, name)})" for name in names]
    return section("Tasks", table(("model", *headers, "mean"), rows), note(text), commands_block(_step(report, "eval")))


def _metric_of(report: Mapping[str, Any], task: str) -> str:
    """The metric that stands for a task."""
    every = (score((model["quality"].get("tasks") or {}).get(task, {})) for model in report["models"])
    return next((found[0] for found in every if found is not None), "")


def _score_cell(metrics: Mapping[str, Any] | None) -> str:
    found = score(metrics) if metrics else None
    if found is None:
        return ""
    _, value, error = found
    return _percent(value) + (f" ± {100 * error:.1f}" if isinstance(error, float) else "")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _layers_section(report: Mapping[str, Any]) -> Markup:
    models = [model for model in report["models"] if model["layer_sparsity"]]
    if not models:
        return Markup("")
    return section(
        "Where weights were pruned", _layers_figure(models, "Sparsity by decoder layer", _step(report, "prune"))
    )


def _layers_figure(models: Sequence[Mapping[str, Any]], title: str, commands: Sequence[str]) -> Markup:
    lines = [Series(model["name"], list(enumerate(model["layer_sparsity"]))) for model in models]
    chart = line_chart(lines, title=title, x_label="decoder layer", y_label="sparsity", whole_x=True)
    return figure(chart, "Fraction of masked weights in each layer; the file may hold more zeros.", commands)


def _allocation_sections(report: Mapping[str, Any]) -> Iterator[Markup]:
    """For each sparsity that several allocations spread differently: their layers, quality and speed."""
    summary = {row["model"]: row for row in _first_rows(report)}
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for model in report["models"]:
        if model["layer_sparsity"] and model.get("allocation"):
            groups.setdefault(round(100 * model["sparsity"]), []).append(model)
    for percent, models in sorted(groups.items()):
        if len({model["allocation"] for model in models}) < 2:
            continue
        rows = []
        for model in models:
            row = summary[model["name"]]
            lowest, highest = min(model["layer_sparsity"]), max(model["layer_sparsity"])
            cells = (model["allocation"], f"{lowest:.1%}", f"{highest:.1%}", f"{row['perplexity']:.2f}")
            speed = (_speed_cells(row, "prefill")[0], _speed_cells(row, "decode")[0])
            rows.append((model["name"], *cells, *speed))
        headers = ("model", "allocation", "lowest layer", "highest layer", "perplexity", "prefill", "decode")
        title = f"Allocations at {percent}% sparsity"
        commands = [model["commands"]["prune"] for model in models if "prune" in model.get("commands", {})]
        yield section(title, _layers_figure(models, title, commands), table(headers, rows))


def _step(report: Mapping[str, Any], step: str) -> list[str]:
    """The command lines of one step, of every model that has it."""
    return [model["commands"][step] for model in report["models"] if step in model.get("commands", {})]
