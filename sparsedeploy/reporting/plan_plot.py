"""Plans side by side: a table with bars for the terminal, a PNG for everything else."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_bytes
from sparsedeploy.plan import ModuleTarget, SparsityPlan

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
    """Group a plan's modules by the layer number in their names."""
    by_layer: dict[int, dict[str, ModuleTarget]] = {}
    for target in plan.targets:
        parts = target.name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        layer, name = (int(parts[at]), ".".join(parts[at + 1 :])) if at is not None else (0, target.name)
        by_layer.setdefault(layer, {})[name] = target
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
    """Draw the plans into a PNG: sparsity by layer, and a panel of modules for each plan that varies within layers.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"plot {path} is not a .png", "Name it, for example, plan.png.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib", "Install it: pip install 'sparsedeploy[plot]'.") from error
    profiles = {label: profile(plan) for label, plan in plans.items()}
    detailed = {label: one for label, one in profiles.items() if one.varies_within_layers}
    rows = 1 + len(detailed)
    heights = [3.2, *(0.32 * len(one.modules) + 0.9 for one in detailed.values())]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(rows, 1, height_ratios=heights)
    _draw_lines(figure.add_subplot(grid[0]), profiles, plans)
    for at, (label, one) in enumerate(detailed.items(), 1):
        _draw_modules(figure, figure.add_subplot(grid[at]), label, one)
    image = io.BytesIO()
    figure.savefig(image, dpi=130, format="png")
    write_bytes(path, image.getvalue())


def _draw_lines(axes: Any, profiles: Mapping[str, PlanProfile], plans: Mapping[str, SparsityPlan]) -> None:
    markers = "osD^vP*X"
    for at, (label, one) in enumerate(profiles.items()):
        axes.plot(one.layers, marker=markers[at % len(markers)], markersize=4, linewidth=1.4, label=label)
    for target in sorted({plan.sparsity for plan in plans.values()}):
        axes.axhline(target, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("sparsity")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(5, len(profiles)), frameon=False)


def _draw_modules(figure: Any, axes: Any, label: str, one: PlanProfile) -> None:
    values = [[float("nan") if rate is None else rate for rate in rates] for rates in one.modules.values()]
    image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(one.modules)), [name.rpartition(".")[2] for name in one.modules], fontsize=8)
    axes.set_xlabel("decoder layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(label, fontsize=9)
    figure.colorbar(image, ax=axes, label="sparsity")


def _kept(layer: Mapping[str, ModuleTarget]) -> str | None:
    patterns = {target.pattern for target in layer.values() if target.pattern is not None}
    if not patterns:
        return None
    kept = sorted(pattern.n for pattern in patterns)
    widths = sorted({pattern.m for pattern in patterns})
    return f"{'-'.join(map(str, dict.fromkeys((kept[0], kept[-1]))))}:{'/'.join(map(str, widths))}"
