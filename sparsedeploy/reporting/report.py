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

from sparsedeploy.reporting.benchmark_page import (
    environment,
    notes_section,
    profile_sections,
    repeat_command,
    sizes_section,
    speed_sections,
)
from sparsedeploy.reporting.charts import Disc, Series, line_chart, scatter_chart
from sparsedeploy.reporting.levels import levels_section
from sparsedeploy.reporting.page import commands_block, figure, note, page, pairs, section, table
from sparsedeploy.reporting.samples import samples_section
from sparsedeploy.reporting.summary import (
    HEADERS,
    accuracy,
    cells,
    engines_of,
    first_rows,
    heading,
    probes_of,
    reasons,
    results,
    score,
    speed_cells,
    summary_rows,
)

FORMAT = 3


def html_report(report: Mapping[str, Any]) -> str:
    """The report as one HTML file that is whole without its script and needs nothing outside it."""
    first = engines_of(report)[0]["benchmark"]
    quality = report["models"][0]["quality"]
    lines = []
    if probes_of(report):
        lines.append(note(f"Probe: {report['probe']['title']}: for speed only, its text means nothing."))
    lines += [note(text) for text in [*reasons(report), *report.get("skipped", [])]]
    summary = section(
        "Quality, size and speed",
        table(HEADERS, [cells(row) for row in summary_rows(report)]),
        note(
            f"{heading(first)}. Perplexity: {quality['data']} ({quality['split']} split), {quality['windows']} "
            f"windows of {quality['context']} tokens, in {report.get('perplexity_in', 'torch')}. Prefill and decode: "
            "speedup over dense in the same engine, the median of the rounds' ratios; '?' where its 95 % interval "
            "includes 1. Limit: the highest decode speedup that memory traffic alone would allow. Size: the exported "
            "folder; some engines compress zeros when they load the graph, not on disk."
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
            levels_section(report, first_rows(report)),
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
            lines.setdefault(_how(one), []).append((one["rate"], one["perplexity"]))
    series = [Series(name, sorted(points)) for name, points in lines.items()]
    rates = [one["rate"] for one in trials]
    series.append(Series("bound", [(min(rates), bound), (max(rates), bound)]))
    chart = line_chart(
        series, title="Rates that were tried", x_label="sparsity", y_label="perplexity, log scale", log_y=True
    )
    rows = [
        (
            _how(one),
            f"{one['rate']:.0%}",
            one["reason"] or f"{one['perplexity']:.3f}",
            "yes" if one["perplexity"] is not None and one["perplexity"] <= bound else "no",
            f"{one['seconds']:.0f} s",
        )
        for one in trials
    ]
    headers = ("method, allocation, recovery", "sparsity", "perplexity", "within the bound", "time")
    return section(
        "Rates that were tried",
        figure(chart, f"Perplexity on held-out text in PyTorch; the bound is {bound:.3f}."),
        table(headers, rows),
        *_compared(report.get("compared", [])),
    )


def _how(trial: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, [trial["method"], trial["allocation"], trial.get("recovery")]))


def _compared(compared: Sequence[Mapping[str, Any]]) -> Iterator[Markup]:
    """The comparison that a search went on from."""
    if compared:
        rows = [
            (f"{one['method']}, {one['allocation']}", one["reason"] or f"{one['perplexity']:.3f}") for one in compared
        ]
        yield note(
            f"Methods and allocations were compared before, at {compared[0]['rate']:.0%}: every layer pruned on the "
            "dense model's inputs, from one calibration, and the perplexity estimated on a part of the text:"
        )
        yield table(("method and allocation", "perplexity"), rows)


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
    rows = [row for row in first_rows(report) if row["decode_ms"] is not None]
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
    summary = {row["model"]: row for row in first_rows(report)}
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
            speed = (speed_cells(row, "prefill")[0], speed_cells(row, "decode")[0])
            rows.append((model["name"], *cells, *speed))
        headers = ("model", "allocation", "lowest layer", "highest layer", "perplexity", "prefill", "decode")
        title = f"Allocations at {percent}% sparsity"
        commands = [model["commands"]["prune"] for model in models if "prune" in model.get("commands", {})]
        yield section(title, _layers_figure(models, title, commands), table(headers, rows))


def _step(report: Mapping[str, Any], step: str) -> list[str]:
    """The command lines of one step, of every model that has it."""
    return [model["commands"][step] for model in report["models"] if step in model.get("commands", {})]
