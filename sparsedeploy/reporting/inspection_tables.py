"""What ``inspect`` found, as tables for the terminal and as plain data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from sparsedeploy.checkpoint.comparison import FolderDifference, TensorChange
from sparsedeploy.checkpoint.inspection import Inspection, ModuleFindings
from sparsedeploy.checkpoint.sizes import FormatSize, format_sizes
from sparsedeploy.plan import layer_number

_LEVELS = " ▁▂▃▄▅▆▇█"
_SHOWN = 8


def inspection_parts(folder: Path, result: Inspection) -> Iterator[RenderableType]:
    """The modules, the layers that lost most, the sizes in each format, and the verdict."""
    plan = result.manifest.plan
    parts = zip(*(module.name.split(".") for module in result.modules), strict=False)
    common = "".join(f"{group[0]}." for group in itertools.takewhile(lambda group: len(set(group)) == 1, parts))
    yield f"{folder}: {result.manifest.method}, {plan.allocation}, {plan.pattern}"
    planned = {target.name: target.sparsity for target in plan.targets}
    columns: dict[str, Callable[[ModuleFindings], str]] = {
        "module": lambda module: module.name.removeprefix(common),
        "shape": lambda module: f"{module.rows} x {module.columns}",
        "masked": lambda module: f"{module.sparsity:.4f}",
    }
    # What says nothing leaves the width of a terminal to the rest.
    if any(module.sparsity != planned[module.name] for module in result.modules):
        columns["planned"] = lambda module: f"{planned[module.name]:.4f}"
    columns["zero"] = lambda module: f"{module.zeros / (module.rows * module.columns):.4f}"
    if any(module.pattern is not None for module in result.modules):
        columns["pattern"] = _pattern
    columns["rows 0..1"] = lambda module: _histogram(module.row_sparsity)
    left = tuple(at for at, name in enumerate(columns) if name in ("module", "shape", "pattern", "rows 0..1"))
    table = _table(f"modules of {common}" if common else "modules", tuple(columns), left)
    for module in result.modules:
        table.add_row(*(cell(module) for cell in columns.values()))
    yield table
    if result.losses:
        yield _losses_table(result)
    yield sizes_table(format_sizes(module.matrix for module in result.modules))
    yield (
        f"global sparsity {result.sparsity:.5f} (masked weights), asked {plan.sparsity:.5f}, over "
        f"{len(result.modules)} modules; {result.zeros:.5f} of the weights are zero in the file"
    )
    yield from _pattern_verdict(result)
    if not result.problems:
        yield "the folder matches its manifest: files, masks, pruned weights and patterns"
    for problem in result.problems:
        yield f"problem: {problem}"


def inspection_values(result: Inspection) -> dict[str, Any]:
    """The same as plain data."""
    modules = [
        {
            **asdict(module),
            "pattern": str(module.pattern) if module.pattern else None,
            "sparsity": module.sparsity,
            "follows": module.follows,
        }
        for module in result.modules
    ]
    for module in modules:
        del module["matrix"]
    return {
        "sparsity": result.sparsity,
        "zeros": result.zeros,
        "modules": modules,
        "layer_losses": {"head" if layer is None else str(layer): loss for layer, loss in result.losses.items()},
        "format_bytes": {one.name: one.bytes for one in format_sizes(module.matrix for module in result.modules)},
        "problems": result.problems,
        "plan": result.manifest.plan.to_dict(),
    }


def difference_parts(a: Path, b: Path, found: FolderDifference) -> Iterator[RenderableType]:
    """A against B."""
    if found.equal:
        yield f"{a} and {b} are the same model: configuration and all {found.same} tensors"
        return
    yield f"A: {a}"
    yield f"B: {b}"
    if found.config:
        table = _table("config.json", ("key", "A", "B"), left=(0, 1, 2))
        for key, (one, two) in found.config.items():
            table.add_row(key, _value(one), _value(two))
        yield table
    for folder, names in zip("AB", found.only, strict=True):
        if names:
            yield f"only in {folder}: {_some(names)}"
    for name, (one_shape, two_shape) in found.shapes.items():
        yield f"{name}: shape {one_shape} in A, {two_shape} in B"
    if found.layers:
        yield _layers_table(found)
    if found.changed:
        changed = sorted(found.changed, key=lambda one: -(one.lost or 0.0))
        headers = ("tensor", "changed", "largest", "lost", "zero A", "zero B")
        table = _table("tensors that changed most (lost: the part of the norm)", headers)
        for change in changed[:_SHOWN]:
            table.add_row(*_change_cells(change))
        yield table
    total, size = sum(one.changed for one in found.changed), sum(one.size for one in found.changed)
    count = len(found.changed) + found.same
    if found.changed:
        yield (
            f"{len(found.changed)} of {count} tensors differ, in {total:,} of their {size:,} elements; {found.same} "
            "are equal bit for bit"
        )
        largest = found.largest
        assert largest is not None
        yield f"largest change of a weight: {largest.largest:.4g} in {largest.name}"
    else:
        yield f"all {count} tensors of both are equal bit for bit"
    if found.overlap:
        yield _overlap_line(found)


def difference_values(found: FolderDifference) -> dict[str, Any]:
    """The same as plain data."""
    values = asdict(found)
    if found.overlap is not None:
        values["overlap"] = [{**asdict(one), "jaccard": one.jaccard} for one in found.overlap]
    return {**values, "equal": found.equal}


def sizes_table(sizes: list[FormatSize]) -> Table:
    """Bytes of the pruned matrices in each format."""
    table = _table(
        "bytes of the pruned matrices in each format", ("format", "MB", "of 16-bit", "loads", ""), left=(0, 3, 4)
    )
    dense = next(one.bytes for one in sizes if one.name == "dense 16-bit") or 1
    for one in sizes:
        figures = ("-", "-") if one.bytes is None else (f"{one.bytes / 1e6:,.2f}", f"{one.bytes / dense:.3f}")
        table.add_row(one.name, *figures, one.loads, one.note)
    return table


def _losses_table(result: Inspection) -> Table:
    total = sum(result.losses.values()) or 1.0
    table = _table("layers that lost most (reconstruction error)", ("layer", "error", "share", "most in"))
    for layer, loss in list(result.losses.items())[:_SHOWN]:
        inside = max((m for m in result.modules if m.layer == layer), key=lambda m: m.loss or 0.0)
        table.add_row(
            "head" if layer is None else str(layer), f"{loss:.4g}", f"{loss / total:.1%}", _short(inside.name)
        )
    return table


def _layers_table(found: FolderDifference) -> Table:
    table = _table("decoder layers", ("layer", "zero in A", "zero in B", "norm lost", "masks shared"))
    shared: dict[int | None, list[int]] = {}
    for one in found.overlap or []:
        total = shared.setdefault(layer_number(one.name), [0, 0])
        total[0] += one.both
        total[1] += sum(one.pruned) - one.both
    for layer in found.layers:
        both, either = shared.get(layer.layer, (0, 0))
        table.add_row(
            str(layer.layer),
            *(f"{value:.4f}" for value in layer.sparsity),
            "" if layer.lost is None else f"{layer.lost:.4f}",
            f"{both / either:.1%}" if either else "",
        )
    return table


def _overlap_line(found: FolderDifference) -> str:
    overlap = found.overlap or []
    both = sum(one.both for one in overlap)
    pruned = [sum(one.pruned[at] for one in overlap) for at in (0, 1)]
    either = sum(pruned) - both
    least = min(overlap, key=lambda one: one.jaccard)
    return (
        f"masks: {both:,} weights are pruned by both, {either:,} by either ({both / (either or 1):.1%}); least in "
        f"{least.name} ({least.jaccard:.1%})"
    )


def _change_cells(change: TensorChange) -> tuple[str, ...]:
    types = change.types
    return (
        change.name.removeprefix("model.").removesuffix(".weight")
        + (f" ({types[0]}, {types[1]})" if types[0] != types[1] else ""),
        f"{change.changed / (change.size or 1):.1%}",
        f"{change.largest:.4g}",
        "" if change.lost is None else f"{change.lost:.4f}",
        *(f"{zeros / (change.size or 1):.4f}" for zeros in change.zeros),
    )


def _pattern_verdict(result: Inspection) -> Iterator[str]:
    patterned = [module for module in result.modules if module.pattern is not None]
    if not patterned:
        return
    broken = [module for module in patterned if module.broken]
    if not broken:
        yield f"every group of all {len(patterned)} N:M modules is whole"
        return
    worst = max(broken, key=lambda module: module.broken or 0)
    yield (
        f"the N:M pattern is broken in {len(broken)} of {len(patterned)} modules, most in {worst.name}: "
        f"{worst.broken:,} groups"
    )


def _pattern(module: ModuleFindings) -> str:
    if module.pattern is None:
        return "-"
    return f"{module.pattern} {'ok' if module.follows else f'BROKEN in {module.broken}'}"


def _histogram(counts: list[int]) -> str:
    most = max(counts)
    return "".join(_LEVELS[-(-count * (len(_LEVELS) - 1) // most)] for count in counts)


def _table(title: str, headers: tuple[str, ...], left: tuple[int, ...] = (0,)) -> Table:
    table = Table(title=title, title_justify="left")
    for at, heading in enumerate(headers):
        figures = at not in left
        table.add_column(heading, justify="right" if figures else "left", no_wrap=figures or at == 0)
    return table


def _short(name: str) -> str:
    """Without what stands before the layer's number."""
    parts = name.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[at + 1 :])


def _value(value: Any) -> str:
    return "-" if value is None else str(value)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
