"""``sparsedeploy inspect``."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sparsedeploy.cli.common import JsonOption, console, print_json
from sparsedeploy.errors import UserError

if TYPE_CHECKING:
    from sparsedeploy.checkpoint.inspection import Inspection, ModuleFindings
    from sparsedeploy.plan import SparsityPlan

_LEVELS = " ▁▂▃▄▅▆▇█"


def inspect_command(
    subjects: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Pruned folders or plan files; several are compared.")
    ],
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw the plans into this .png.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what was pruned and verify the folder against its manifest; show plans, several side by side."""
    plans = _plans(subjects)
    if plot is not None:
        from sparsedeploy.reporting.plan_plot import save_plot

        save_plot(plans, plot)
    if len(subjects) == 1 and subjects[0].is_dir():
        _inspect_checkpoint(subjects[0], as_json)
    elif as_json:
        print_json({label: plan.to_dict() for label, plan in plans.items()})
    else:
        from sparsedeploy.reporting.plan_plot import plan_table

        console.print(plan_table(plans, console.width))
        for label, plan in plans.items():
            console.print(
                f"{label}: {plan.achieved:.5f} global sparsity, asked {plan.sparsity:.5f} "
                f"({plan.allocation}, {plan.pattern})",
                soft_wrap=True,
            )


def _plans(subjects: list[Path]) -> dict[str, SparsityPlan]:
    """Label -> plan; the label is the file's or folder's name, or the whole path where names repeat."""
    from sparsedeploy.checkpoint.manifest import load_manifest
    from sparsedeploy.plan import SparsityPlan

    names = [path.stem if path.is_file() else path.name for path in subjects]
    plans: dict[str, SparsityPlan] = {}
    for path, name in zip(subjects, names, strict=True):
        label = name if names.count(name) == 1 and name else str(path)
        is_plan = path.is_file() or path.suffix == ".json"
        plans[label] = SparsityPlan.load(path) if is_plan else load_manifest(path).plan
    return plans


def _inspect_checkpoint(checkpoint: Path, as_json: bool) -> None:
    from sparsedeploy.checkpoint.inspection import inspect_checkpoint

    result = inspect_checkpoint(checkpoint)
    if as_json:
        print_json(_as_dict(result))
    else:
        _print(checkpoint, result)
    if result.problems:
        raise UserError(
            f"{checkpoint} differs from its manifest: {result.problems[0]}"
            + (f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""),
            "Prune the model again.",
        )


def _print(checkpoint: Path, result: Inspection) -> None:
    plan = result.manifest.plan
    table = Table(title=f"{checkpoint}: {result.manifest.method}, {plan.allocation}, {plan.pattern}")
    for heading in ("module", "shape", "masked", "planned", "zero", "pattern", "rows 0..1"):
        table.add_column(heading, justify="right" if heading in ("masked", "planned", "zero") else "left", no_wrap=True)
    parts = zip(*(module.name.split(".") for module in result.modules), strict=False)
    common = "".join(f"{group[0]}." for group in itertools.takewhile(lambda group: len(set(group)) == 1, parts))
    console.print(f"modules of {common}" if common else "modules")
    planned = {target.name: target.sparsity for target in plan.targets}
    for module in result.modules:
        table.add_row(
            module.name.removeprefix(common),
            f"{module.rows} x {module.columns}",
            f"{module.sparsity:.4f}",
            f"{planned[module.name]:.4f}",
            f"{module.zeros / (module.rows * module.columns):.4f}",
            _pattern(module),
            _histogram(module.row_sparsity),
        )
    console.print(table)
    console.print(
        f"global sparsity {result.sparsity:.5f} (masked weights), asked {plan.sparsity:.5f}, over "
        f"{len(result.modules)} modules; {result.zeros:.5f} of the weights are zero in the file",
        soft_wrap=True,
    )
    if not result.problems:
        console.print("the folder matches its manifest: files, masks, pruned weights and patterns")
    for problem in result.problems:
        console.print(f"problem: {problem}", markup=False)


def _pattern(module: ModuleFindings) -> str:
    if module.pattern is None:
        return "-"
    return f"{module.pattern} {'ok' if module.follows else 'BROKEN'}"


def _histogram(counts: list[int]) -> str:
    most = max(counts)
    return "".join(_LEVELS[-(-count * (len(_LEVELS) - 1) // most)] for count in counts)


def _as_dict(result: Inspection) -> dict[str, object]:
    modules = [
        {**asdict(module), "pattern": str(module.pattern) if module.pattern else None, "sparsity": module.sparsity}
        for module in result.modules
    ]
    return {
        "sparsity": result.sparsity,
        "zeros": result.zeros,
        "modules": modules,
        "problems": result.problems,
        "plan": result.manifest.plan.to_dict(),
    }
