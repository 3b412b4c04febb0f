"""One calibration for a whole search: the plans of every rate, and which method and allocation to go on with.

What does not depend on the rate is measured once, on the dense model: the allocations' scores, and the statistics that
every method prunes each linear from at the middle rate. Models that are put together from these weights are compared.
They are worse than models that are pruned layer after layer, each layer on what the pruned ones before it give, but
rank alike; the trials at the rates that follow are such real prunings.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch

from sparsedeploy import progress
from sparsedeploy.allocation.allocate import measure_each
from sparsedeploy.errors import UserError
from sparsedeploy.models.computing import resolve_device
from sparsedeploy.models.layers import ResidentLayers, StreamedLayers
from sparsedeploy.models.linear_views import assign_weight
from sparsedeploy.models.loading import load_model
from sparsedeploy.plan import SparsityPlan
from sparsedeploy.pruning.levels import LevelDatabase, Wanted, add_levels
from sparsedeploy.quality.perplexity import perplexity
from sparsedeploy.registry import ALLOCATORS, PRUNERS
from sparsedeploy.workflows.deploy_request import Prepared
from sparsedeploy.workflows.deploy_search import Pair, Space

_FEWEST = 8  # windows that pairs are compared on


def plan_path(prepared: Prepared, allocation: str, rate: float) -> Path:
    """Where the plan of a rate is kept."""
    return prepared.output / "plans" / f"{allocation}-{100 * rate:g}.json"


def make_plans(prepared: Prepared, space: Space) -> None:
    """Measure the dense model once and write the plans of all rates; those that cannot be met are left out."""
    wanted = [
        (name, rate) for name in space.spread for rate in space.rates if not plan_path(prepared, name, rate).exists()
    ]
    names = dict.fromkeys(name for name, _ in wanted)
    if not names:
        return
    calibration = prepared.options.calibration
    measures = any(ALLOCATORS.get(name).traits["needs"] not in ("none", "weights") for name in names)
    measured = measure_each(
        _layers(prepared),
        prepared.drawn.tokens if measures else None,
        None,
        {name: ALLOCATORS.get(name).make_options() for name in names},
        batch_size=calibration.batch_size,
        accumulate=calibration.accumulation,
    )
    (prepared.output / "plans").mkdir(exist_ok=True)
    for name, rate in wanted:
        try:
            measured.plan(name, rate, prepared.request["model_sha256"]).save(plan_path(prepared, name, rate))
        except UserError as error:
            progress.note(f"     {rate:.0%}, {name}: {error.message}")


def compare_pairs(prepared: Prepared, space: Space, dense: float) -> list[dict[str, Any]]:
    """Estimate the perplexity of every method with every allocation at the middle rate; None where there is none.

    A part of the windows ranks them: what counts is how much larger the perplexity is than the dense model's there.

    Args:
        dense: the dense model's perplexity on all windows.

    Raises:
        UserError: any step that fails.
    """
    paths = {name: plan_path(prepared, name, space.middle) for name in space.spread}
    plans = {name: SparsityPlan.load(path) for name, path in paths.items() if path.exists()}
    calibration = prepared.options.calibration
    folder = prepared.output / "levels"
    wanted = [
        Wanted(
            LevelDatabase(folder / method, {"method": method, "request": prepared.request}),
            [target for plan in plans.values() for target in plan.targets],
            method,
            PRUNERS.get(method).make_options(),
        )
        for method in space.methods
    ]
    add_levels(
        _layers(prepared),
        prepared.drawn.tokens if any(each.needs != "none" for each in wanted) else None,
        wanted,
        batch_size=calibration.batch_size,
        accumulate=calibration.accumulation,
    )
    databases = {each.method: each.database for each in wanted}
    rows = []
    model = load_model(prepared.folder, dtype=torch.float32, device=resolve_device("auto"))
    linears = ResidentLayers(model).stack.all_linears()
    few = prepared.windows[: max(len(prepared.windows) // 4, _FEWEST)]
    scale = dense / perplexity(model, few).perplexity
    for method, allocation in space.pairs:
        row: dict[str, Any] = {"rate": space.middle, "method": method, "allocation": allocation, "perplexity": None}
        if (plan := plans.get(allocation)) is None:
            rows.append({**row, "reason": "its budget cannot be met"})
            continue
        for target in plan.targets:
            weight = linears[target.name].weight
            assign_weight(linears[target.name], databases[method].read(target).to(weight.device, weight.dtype))
        found, reason = tried_perplexity(model, few)
        rows.append({**row, "perplexity": found and found * scale, "reason": reason})
    shutil.rmtree(folder)
    return rows


def tried_perplexity(model: Any, windows: torch.Tensor) -> tuple[float | None, str | None]:
    """The perplexity, or None and why a model that diverged has none.

    Raises:
        UserError: any other reason.
    """
    try:
        return perplexity(model, windows).perplexity, None
    except UserError as error:
        if "diverged" not in error.message:
            raise
        return None, error.message


def pairs_of(rows: list[dict[str, Any]]) -> dict[Pair, float]:
    """(method, allocation) -> perplexity; infinity where there is none."""
    return {
        (row["method"], row["allocation"]): math.inf if row["perplexity"] is None else row["perplexity"] for row in rows
    }


def _layers(prepared: Prepared) -> StreamedLayers:
    return StreamedLayers(prepared.folder, device=resolve_device("auto"))
