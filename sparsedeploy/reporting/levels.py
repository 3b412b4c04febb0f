"""The models of a report one by one: figures, and heat maps of sparsity and reconstruction error by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from sparsedeploy.checkpoint.manifest import Manifest
from sparsedeploy.plan import depths
from sparsedeploy.reporting.charts import heat_map
from sparsedeploy.reporting.page import beside, details, figure, levels, note, section, table

Cells = dict[str, list[float | None]]


def module_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """What a report keeps of each pruned module."""
    depth_of = depths(manifest.modules)
    return [
        {
            "layer": depth_of[name],
            "projection": name.rpartition(".")[2],
            "weights": module.rows * module.columns,
            "zeros": module.zeros,
            "loss": module.loss,
        }
        for name, module in manifest.modules.items()
    ]


def levels_section(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Every model with its figures and, where it was pruned, its heat maps; empty with fewer than two models.

    Args:
        rows: of the summary, in the order of the models.
    """
    if len(report["models"]) < 2:
        return Markup("")
    dense = rows[0]["perplexity"]
    pairs = sorted(zip(report["models"], rows, strict=True), key=lambda pair: pair[0]["sparsity"])
    parts = [(model["name"], Markup("").join(_level(model, row, dense))) for model, row in pairs]
    return section(
        "By sparsity",
        levels("levels", "Model, by sparsity", parts),
        note(
            "Left: the share of pruned weights. Right: the method's own reconstruction error on the calibration text, "
            "where it reports one; the strongest colour is the largest of this model."
        ),
    )


def _level(model: Mapping[str, Any], row: Mapping[str, Any], dense: float) -> list[Markup]:
    facts = [
        ("sparsity", f"{model['sparsity']:.1%}"),
        ("perplexity", f"{row['perplexity']:.3f} ({row['perplexity'] / dense - 1:+.1%} against dense)"),
        ("size on disk", f"{row['size_mb']:.1f} MB"),
        ("weights that are not zero", f"{row['nonzero_millions']:.2f} M"),
        ("prefill", _speed(row, "prefill")),
        ("decode", _speed(row, "decode")),
    ]
    parts = [table(("measured", "value"), facts, numbers=False, label=f"figures of {model['name']}")]
    modules = model.get("modules")
    if not modules:
        return parts
    sparsity, losses = _cells(modules)
    maps = [_map(model["name"], "sparsity", sparsity, 1.0)]
    most = max((value for values in losses.values() for value in values if value is not None), default=0.0)
    if most > 0:
        maps.append(_map(model["name"], "reconstruction error", losses, most))
    parts.append(beside(*maps))
    parts.append(details("The values", _values(model["name"], sparsity, losses)))
    return parts


def _speed(row: Mapping[str, Any], phase: str) -> str:
    if row[f"{phase}_ms"] is None:
        return "not measured"
    ms = f"{row[f'{phase}_ms']:.2f} ms"
    if row["baseline"]:
        return f"{ms} (the baseline)"
    speedup = row[f"{phase}_speedup"]
    return f"{ms}, {speedup['median']:.2f}x ({speedup['low']:.2f} to {speedup['high']:.2f})"


def _cells(modules: Sequence[Mapping[str, Any]]) -> tuple[Cells, Cells]:
    """Sparsity and error by projection and layer; experts of one projection count together."""
    names = list(dict.fromkeys(one["projection"] for one in modules))
    count = 1 + max(one["layer"] for one in modules)
    sums: dict[tuple[str, int], list[float]] = {}
    known: set[tuple[str, int]] = set()
    for one in modules:
        key = one["projection"], one["layer"]
        total = sums.setdefault(key, [0.0, 0.0, 0.0])
        for at, value in enumerate((one["zeros"], one["weights"], one["loss"] or 0.0)):
            total[at] += value
        if one["loss"] is not None:
            known.add(key)
    sparsity: Cells = {
        name: [sums[name, at][0] / sums[name, at][1] if (name, at) in sums else None for at in range(count)]
        for name in names
    }
    losses: Cells = {
        name: [sums[name, at][2] if (name, at) in known else None for at in range(count)] for name in names
    }
    return sparsity, losses


def _map(model: str, what: str, rows: Cells, darkest: float) -> Markup:
    title = f"{model}: {what} by layer and projection"
    chart = heat_map(rows, title=title, x_label="decoder layer", darkest=darkest)
    every = [value for values in rows.values() for value in values if value is not None]
    return figure(chart, f"{what.capitalize()}, from {min(every):.3g} to {max(every):.3g}.")


def _values(model: str, sparsity: Cells, losses: Cells) -> Markup:
    """The heat maps' values as a table."""
    layers = range(len(next(iter(sparsity.values()))))
    rows = [[str(at), *(_value(sparsity[name][at], losses[name][at]) for name in sparsity)] for at in layers]
    return table(("layer", *sparsity), rows, label=f"sparsity and error of {model}")


def _value(sparsity: float | None, loss: float | None) -> str:
    if sparsity is None:
        return ""
    return f"{sparsity:.3f}" + ("" if loss is None else f" ({loss:.2g})")
