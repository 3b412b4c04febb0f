"""``sparsedeploy inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsedeploy.cli.common import JsonOption, console, print_json
from sparsedeploy.cli.flags import Given, Section, takes
from sparsedeploy.errors import UserError
from sparsedeploy.workflows.options import InspectOptions, PictureOptions

if TYPE_CHECKING:
    from sparsedeploy.plan import SparsityPlan


@takes(Section("inspect", InspectOptions), Section("pictures", PictureOptions))
def inspect_command(
    given: Given,
    subjects: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Pruned folders or plan files; several are compared.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Show what was pruned and verify it; compare two folders, or several plans.

    For one folder also the layers with the largest loss, the size in each format, and a picture of a mask.
    """
    against = given.build("inspect", InspectOptions).against
    if against is not None:
        given.refuse_unread({"pictures": "--against compares two folders"})
        _compare(subjects, against, as_json)
        return
    draw = given.build("pictures", PictureOptions)
    single = len(subjects) == 1 and subjects[0].is_dir()
    if draw.mask is not None:
        if not single:
            raise UserError("--mask draws a matrix of one pruned folder", "Name one folder, or leave --mask out.")
        _draw_mask(subjects[0], draw.mask, draw.module)
    plans = _plans(subjects)
    if draw.plot is not None:
        from sparsedeploy.reporting.plan_plot import save_plot

        save_plot(plans, draw.plot)
    if single:
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
    from sparsedeploy.reporting.inspection_tables import inspection_parts, inspection_values

    result = inspect_checkpoint(checkpoint)
    if as_json:
        print_json(inspection_values(result))
    else:
        for part in inspection_parts(checkpoint, result):
            console.print(part, soft_wrap=isinstance(part, str))
    if result.problems:
        raise UserError(
            f"{checkpoint} differs from its manifest: {result.problems[0]}"
            + (f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""),
            "Prune the model again.",
        )


def _compare(subjects: list[Path], against: Path, as_json: bool) -> None:
    from sparsedeploy.checkpoint.comparison import compare_folders
    from sparsedeploy.reporting.inspection_tables import difference_parts, difference_values

    if len(subjects) != 1 or not subjects[0].is_dir() or not against.is_dir():
        raise UserError("--against compares one model folder with another", "Name two folders: inspect A --against B.")
    found = compare_folders(subjects[0], against)
    if as_json:
        print_json(difference_values(found))
        return
    for part in difference_parts(subjects[0], against, found):
        console.print(part, soft_wrap=isinstance(part, str))


def _draw_mask(checkpoint: Path, picture: Path, wanted: str | None) -> None:
    """Draw one module's mask.

    Raises:
        UserError: no such module, or several, or a picture that cannot be written.
    """
    from sparsedeploy.checkpoint import masks as mask_file
    from sparsedeploy.checkpoint.manifest import load_manifest
    from sparsedeploy.reporting.mask_picture import mask_charts
    from sparsedeploy.reporting.pictures import check_picture, save_picture

    check_picture(picture)
    manifest = load_manifest(checkpoint)
    modules = manifest.modules
    if wanted is None:
        name = max(modules, key=lambda one: modules[one].loss or 0.0)
    else:
        found = [one for one in modules if one == wanted or one.endswith(f".{wanted}")]
        if len(found) != 1:
            some = f"{len(found)} do, such as {found[1]}" if found else f"such as {next(iter(modules))}"
            raise UserError(
                f"{'no module ends' if not found else 'not one module alone ends'} in '{wanted}'",
                f"Give more of its name: {some}.",
            )
        name = found[0]
    mask = mask_file.load_masks(checkpoint / mask_file.FILE, {name: modules[name].columns})[name]
    save_picture(mask_charts(name, mask, manifest.plan.by_name[name].pattern), picture)
