"""Plans side by side: a table with bars for the terminal, a picture for everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from sparsedeploy.plan import ModuleTarget, SparsityPlan, depths
from sparsedeploy.reporting.charts import Chart, Series, heat_map, line_chart
from sparsedeploy.reporting.pictures import save_picture

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BAR_CELLS, _FEWEST_CELLS = 40, 4
_SPREAD = 0.02  # modules of one layer that differ by more get their own panel


@dataclass(frozen=True)
class PlanProfile:
    """A plan by layer.

    Attributes:
        layers: weighted sparsity of each layer.
        modules: module name within the layer -> its sparsity by layer, None where a layer lacks it.
        kept: the N of each layer under an N:M pattern, ``None`` without one; ``1-3`` where its modules differ.
    """

    layers: list[float]
    modules: dict[str, list[float | None]]
    kept: list[str | None]

    @property
    def varies_within_layers(self) -> bool:
        """Whether some layer's modules differ by more than rounding."""
        columns = zip(*self.modules.values(), strict=True)
        rates = [[rate for rate in column if rate is not None] for column in columns]
        return any(max(column) - min(column) > _SPREAD for column in rates)


def profile(plan: SparsityPlan) -> PlanProfile:
    """Group a plan's modules by the layer number in their names; the output head is a layer behind the last."""
    by_layer: dict[int, dict[str, ModuleTarget]] = {}
    depth_of = depths(target.name for target in plan.targets)
    for target in plan.targets:
        parts = target.name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        name = ".".join(parts[at + 1 :]) if at is not None else target.name
        by_layer.setdefault(depth_of[target.name], {})[name] = target
    ordered = [by_layer[index] for index in sorted(by_layer)]
    names = list(dict.fromkeys(name for layer in ordered for name in layer))
    return PlanProfile(
        layers=[sum(t.zeros for t in layer.values()) / sum(t.size for t in layer.values()) for layer in ordered],
        modules={name: [layer[name].sparsity if name in layer else None for layer in ordered] for name in names},
        kept=[_kept(layer) for layer in ordered],
    )


def plan_table(plans: Mapping[str, SparsityPlan], width: int = 80) -> Table:
    """Layers down, plans across: the sparsity of each layer, N of M where there is one, and a bar from 0 to 1.

    Args:
        width: of the terminal, in characters; without room for bars only the figures are shown.
    """
    profiles = {label: profile(plan) for label, plan in plans.items()}
    kept_width = max((len(kept) + 1 for one in profiles.values() for kept in one.kept if kept), default=0)
    # Beside the bar a column holds 0.123, a space, N of M, two cells of padding and a border.
    cells = min(_BAR_CELLS, (width - 10) // len(profiles) - 9 - kept_width)
    table = Table()
    table.add_column("layer", justify="right", no_wrap=True)
    for label in profiles:
        table.add_column(label, overflow="fold")
    for index in range(max(len(one.layers) for one in profiles.values())):
        row = [str(index)]
        for one in profiles.values():
            if index >= len(one.layers):
                row.append("")
                continue
            kept = f" {one.kept[index] or ''}".ljust(kept_width) if kept_width else ""
            drawn = f" {bar(one.layers[index], cells)}" if cells >= _FEWEST_CELLS else ""
            row.append(f"{one.layers[index]:.3f}{kept}{drawn}")
        table.add_row(*row)
    return table


def bar(share: float, cells: int) -> str:
    """A horizontal bar of ``share`` of ``cells`` character cells, in steps of an eighth, padded to full width."""
    eighths = round(min(max(share, 0.0), 1.0) * cells * 8)
    full, part = divmod(eighths, 8)
    return (("█" * full) + (_EIGHTHS[part] if part else "")).ljust(cells)


def save_plot(plans: Mapping[str, SparsityPlan], path: Path) -> None:
    """Draw the plans: sparsity by layer, and a heat map of the modules of each plan that varies within layers.

    Raises:
        UserError: see :func:`save_picture`.
    """
    save_picture(plan_charts(plans), path)


def plan_charts(plans: Mapping[str, SparsityPlan]) -> list[Chart]:
    """Sparsity by layer, and a heat map of the modules of each plan that varies within layers."""
    profiles = {label: profile(plan) for label, plan in plans.items()}
    lines = [Series(label, list(enumerate(one.layers))) for label, one in profiles.items()]
    targets = sorted({plan.sparsity for plan in plans.values()})
    title = f"Sparsity by decoder layer, target {', '.join(f'{target:g}' for target in targets)}"
    first = line_chart(lines, title=title, x_label="decoder layer", y_label="sparsity", whole_x=True)
    maps = [
        heat_map(
            {name.rpartition(".")[2]: rates for name, rates in one.modules.items()},
            title=f"{label}: sparsity by module",
            x_label="decoder layer",
        )
        for label, one in profiles.items()
        if one.varies_within_layers
    ]
    return [first, *maps]


def _kept(layer: Mapping[str, ModuleTarget]) -> str | None:
    patterns = {target.pattern for target in layer.values() if target.pattern is not None}
    if not patterns:
        return None
    kept = sorted(pattern.n for pattern in patterns)
    widths = sorted({pattern.m for pattern in patterns})
    return f"{'-'.join(map(str, dict.fromkeys((kept[0], kept[-1]))))}:{'/'.join(map(str, widths))}"
