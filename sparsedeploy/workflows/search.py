"""The plans of ``--allocation auto`` and ``evolve``: what pruned models say, not what their layers promise."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.allocation.allocate import allocate_each
from sparsedeploy.allocation.budget import integer_counts, meet_target, nm_target
from sparsedeploy.allocation.evolve import EvolveOptions, Generation, Levels, Slopes, Space, evolve
from sparsedeploy.allocation.mixed import MixedOptions, mixed_bounds
from sparsedeploy.errors import UserError
from sparsedeploy.grid import Grid
from sparsedeploy.models.layers import ResidentLayers
from sparsedeploy.models.linear_views import assign_weight
from sparsedeploy.paths import expand
from sparsedeploy.plan import NM, MixedNM, ModuleShape, ModuleTarget, SparsityPlan
from sparsedeploy.pruning.layers import prune_model
from sparsedeploy.pruning.levels import FORMAT, LevelDatabase, Wanted, add_levels
from sparsedeploy.quality.divergence import dense_predictions, divergence, divergence_gradients
from sparsedeploy.reading import parse_object, read_bytes
from sparsedeploy.registry import ALLOCATORS
from sparsedeploy.resources import cache_home

Targets = tuple[ModuleTarget, ...]


class PlanScores:
    """Divergence of whole plans from the dense model, by putting levels of the database together.

    Args:
        dense: the model; it is not changed, a copy is.
        head: whether plans name the output head.
        windows: int64 ``[windows, length]`` to compare on.
    """

    def __init__(self, dense: nn.Module, database: LevelDatabase, windows: torch.Tensor, head: bool = False) -> None:
        self._predictions = dense_predictions(dense, windows)
        self._model = copy.deepcopy(dense)
        self._linears = ResidentLayers(self._model, head).stack.all_linears()
        self._loaded: dict[str, ModuleTarget] = {}
        self._database = database

    def __call__(self, targets: Sequence[ModuleTarget], which: range | None = None) -> float:
        self._load(targets)
        return divergence(self._model, self._predictions, which)

    def slopes(
        self, targets: Sequence[ModuleTarget], choices: Sequence[tuple[ModuleTarget | None, ...]], which: Sequence[int]
    ) -> list[tuple[float, ...]] | None:
        """By module, what each other level of it is expected to change the divergence by: the gradient times the
        difference of the weights. NaN for a level that is None; None where weights are slices of larger tensors.

        Args:
            choices: by module of ``targets``, its other levels.
        """
        weights = {name: linear.weight for name, linear in self._linears.items() if isinstance(linear, nn.Linear)}
        if len(weights) < len(self._linears):
            return None
        self._load(targets)
        gradients = divergence_gradients(self._model, self._predictions, weights, which)

        def change(name: str, level: ModuleTarget | None) -> float:
            if level is None or name not in gradients:
                return math.nan
            weight = weights[name].detach()
            other = self._database.read(level).to(weight.device, weight.dtype)
            return float(torch.sum(gradients[name] * (other - weight), dtype=torch.float64))

        return [
            tuple(change(target.name, level) for level in levels)
            for target, levels in zip(targets, choices, strict=True)
        ]

    def _load(self, targets: Sequence[ModuleTarget]) -> None:
        for target in targets:
            if self._loaded.get(target.name) != target:
                linear = self._linears[target.name]
                assign_weight(linear, self._database.read(target).to(linear.weight.device, linear.weight.dtype))
                self._loaded[target.name] = target


def search_plan(
    source: ResidentLayers,
    tokens: torch.Tensor | None,
    windows: torch.Tensor,
    sparsity: float,
    pattern: NM | MixedNM | None,
    allocation: str,
    options: Any,
    *,
    method: str,
    method_options: Any,
    identity: Mapping[str, Any],
    reconstruct: bool = False,
    grid: Grid | None = None,
    mixed: MixedOptions | None = None,
    model_sha256: str | None = None,
    batch_size: int | None = None,
    accumulate: torch.dtype = torch.float32,
) -> SparsityPlan:
    """The best plan of all other allocations, for ``evolve`` after a search that starts from them.

    Args:
        tokens: calibration sequences int64 ``[sequences, length]``.
        windows: held-out text to compare on, int64 ``[windows, length]``.
        identity: what decides a level besides its target; see :class:`LevelDatabase`.
        reconstruct, grid: see :func:`~sparsedeploy.pruning.layers.prune_layers`.

    Raises:
        UserError: a fixed N:M pattern for ``evolve``, a budget outside the levels, a database of another run, or a
            model that has diverged under every plan.
    """
    model, evolves = source.model, isinstance(options, EvolveOptions)
    if isinstance(pattern, NM) and evolves:
        raise UserError(f"pattern {pattern} leaves evolve nothing to search", f"Use --pattern mixed-{pattern}.")
    plans = _plans(
        source,
        tokens,
        sparsity,
        pattern,
        mixed=mixed,
        model_sha256=model_sha256,
        batch_size=batch_size,
        accumulate=accumulate,
    )
    if isinstance(pattern, NM):
        return replace(plans["uniform"], allocation=allocation, options=asdict(options))
    folder = expand(options.database) if options.database else _cache_folder(identity)
    database = LevelDatabase(folder, identity)
    targets = {name: plan.targets for name, plan in plans.items()}
    space, levels = _levels(targets["uniform"], sparsity, pattern, mixed, options) if evolves else (None, [])

    def add(wanted: Sequence[ModuleTarget]) -> None:
        levels = Wanted(database, wanted, method, method_options, reconstruct, grid)
        add_levels(source, tokens, [levels], batch_size=batch_size, accumulate=accumulate)

    add([target for each in (*targets.values(), *levels) for target in each])
    few = windows[: -(-len(windows) // 4)] if options.confirm else windows
    score = PlanScores(model, database, few, source.stack.head is not None)
    scores = _compare("compare allocations", targets, score)
    details: dict[str, Any] = {"selection": options.selection, "scores": scores}
    if space is not None:
        found = _search(space, levels, targets, score, options, folder, few)
        evolved = _exact([levels[unit][at] for unit, at in enumerate(found.levels)], sparsity, pattern)
        add(evolved)
        targets["evolve"], scores["evolve"] = evolved, _plain(score(evolved))
        details["generations"] = found.number
    if options.confirm:
        del score

        def pruned(plan: Sequence[ModuleTarget]) -> float:
            candidate = copy.deepcopy(model)
            whole = replace(plans["uniform"], targets=tuple(plan))
            with progress.hidden():
                prune_model(
                    candidate,
                    tokens,
                    whole,
                    method,
                    method_options,
                    batch_size,
                    accumulate=accumulate,
                    reconstruct=reconstruct,
                    grid=grid,
                )
            return divergence(candidate, dense)

        dense = dense_predictions(model, windows)
        finalists = _finalists(scores, options.confirm)
        scores = details["confirmed"] = _compare("confirm", {name: targets[name] for name in finalists}, pruned)
    lowest, best = min((math.inf if value is None else value, name) for name, value in scores.items())
    if not math.isfinite(lowest):
        raise UserError(
            "the pruned model has diverged with every allocation", "Lower the sparsity or use another method."
        )
    progress.note(f"{allocation}: {best} is closest to the dense model (KL {lowest:.4f})")
    return SparsityPlan(
        sparsity=plans["uniform"].sparsity,
        pattern=plans["uniform"].pattern,
        allocation=allocation,
        targets=targets[best],
        options=asdict(options),
        model_sha256=model_sha256,
        details={"search": {**details, "chosen": best}},
    )


def _plans(
    source: ResidentLayers,
    tokens: torch.Tensor | None,
    sparsity: float,
    pattern: NM | MixedNM | None,
    **known: Any,
) -> dict[str, SparsityPlan]:
    """Uniform first, then every other allocation that does not search; the ones that cannot serve are named."""
    names = ["uniform"]
    if not isinstance(pattern, NM):
        names += [m.name for m in ALLOCATORS if m.traits.get("searches") is not True and m.name != "uniform"]
    options = {name: ALLOCATORS.get(name).make_options() for name in names}
    try:
        return allocate_each(source, tokens, sparsity, pattern, options, **known)
    except UserError:
        plans = allocate_each(source, tokens, sparsity, pattern, {"uniform": options["uniform"]}, **known)
        for name in names[1:]:
            try:
                plans |= allocate_each(source, tokens, sparsity, pattern, {name: options[name]}, **known)
            except UserError as error:
                progress.note(f"without {name}: {error.message}")
        return plans


def _finalists(scores: Mapping[str, float | None], count: int) -> list[str]:
    """Uniform, what a search found, and the ``count`` closest of the others."""
    always = [name for name in ("uniform", "evolve") if name in scores]
    able = [(value, name) for name, value in scores.items() if value is not None and name not in always]
    return [*always, *(name for _, name in sorted(able)[:count])]


def _compare(title: str, targets: Mapping[str, Targets], score: Callable[[Targets], float]) -> dict[str, float | None]:
    """The divergence of each plan, None where the model has diverged; one line each on standard error."""
    scores: dict[str, float | None] = {}
    with progress.bar(title, len(targets), "plans") as advance:
        for name, each in targets.items():
            scores[name] = value = _plain(score(each))
            progress.note(f"{name:>14}  {'diverged' if value is None else f'KL {value:.4f}'}")
            advance()
    return scores


def _plain(score: float) -> float | None:
    return score if math.isfinite(score) else None


def _levels(
    uniform: Targets,
    sparsity: float,
    pattern: NM | MixedNM | None,
    mixed: MixedOptions | None,
    options: EvolveOptions,
) -> tuple[Space, list[Targets]]:
    """The space of a search, and by module the targets of its levels."""
    if isinstance(pattern, MixedNM):
        low, high = mixed_bounds(mixed or MixedOptions(), pattern.m)
        counts = range(high, low - 1, -1)
        tables = [tuple(nm_target(_shape(target), NM(n, pattern.m)) for n in counts) for target in uniform]
    else:
        least, most = max(sparsity - options.spread, 0.0), min(sparsity + options.spread, options.highest)
        grid = [
            options.step * at
            for at in range(math.ceil(least / options.step - 1e-9), math.floor(most / options.step + 1e-9) + 1)
        ]
        counts_of = [sorted({round(rate * target.columns) for rate in grid}) for target in uniform]
        tables = [
            tuple(replace(target, zeros_per_row=zeros) for zeros in counts)
            for target, counts in zip(uniform, counts_of, strict=True)
        ]
        if not grid:
            raise UserError(
                f"no rates of step {options.step:g} lie from {least:g} to {most:g}",
                "Use a smaller allocation option step.",
            )
    kinds: dict[str, list[int]] = {}
    layers: dict[str, list[int]] = {}
    for unit, target in enumerate(uniform):
        kinds.setdefault(target.name.rpartition(".")[2], []).append(unit)
        depth = next((part for part in target.name.split(".") if part.isdigit()), "")
        layers.setdefault(depth, []).append(unit)
    groups = tuple(tuple(units) for units in (*layers.values(), *kinds.values()) if len(units) > 1)
    removed = tuple(tuple(level.zeros for level in table) for table in tables)
    wanted = math.ceil(sum(target.size for target in uniform) * sparsity - 1e-6)
    return Space(removed, wanted, groups), tables


def _search(
    space: Space,
    levels: Sequence[Targets],
    targets: Mapping[str, Targets],
    score: PlanScores,
    options: EvolveOptions,
    folder: Path,
    windows: torch.Tensor,
) -> Generation:
    """Evolve, keeping every generation beside the database: the same search resumes from the last one."""
    rng = random.Random(options.seed)
    starts = [space.nearest([target.zeros for target in each], rng) for each in targets.values()]
    asked = {
        "space": [space.removed, space.wanted],
        "starts": starts,
        "windows": hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest(),
        "options": {key: getattr(options, key) for key in ("offspring", "guided", "seed")},
    }
    path = folder / f"search-{_digest(asked)}.jsonl"
    resumed = _last_generation(path, levels)

    def fitness(vector: Levels, which: range) -> float:
        return score([levels[unit][at] for unit, at in enumerate(vector)], which)

    def slopes(vector: Levels) -> Slopes | None:
        at = [levels[unit][level] for unit, level in enumerate(vector)]
        around = [_around(levels[unit], level) for unit, level in enumerate(vector)]
        found = score.slopes(at, around, range(0, len(windows), 2))
        return None if found is None else [(down, up) for down, up in found]

    def record(generation: Generation) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(generation.to_dict()) + "\n")
            file.flush()
            os.fsync(file.fileno())

    if resumed is not None and resumed.number:
        progress.note(f"resumes after generation {resumed.number}, best KL {resumed.fitness:.4f}")
    return evolve(
        space,
        starts,
        fitness,
        windows=len(windows),
        options=options,
        slopes=slopes,
        resumed=resumed,
        record=record,
    )


def _around(table: Sequence[ModuleTarget], at: int) -> tuple[ModuleTarget | None, ModuleTarget | None]:
    """The levels below and above one."""
    return (table[at - 1] if at else None, table[at + 1] if at + 1 < len(table) else None)


def _last_generation(path: Path, levels: Sequence[Targets]) -> Generation | None:
    """The last whole line of a search's file; text after the last newline is a line that a kill cut short.

    Raises:
        UserError: a file that was edited or is damaged.
    """
    if not path.exists():
        return None
    fix = "Delete it; the search then starts again."
    whole, _, cut = read_bytes(path, fix=fix).rpartition(b"\n")
    if cut:
        os.truncate(path, path.stat().st_size - len(cut))
    if not whole:
        return None
    value = parse_object(whole.rpartition(b"\n")[2], str(path), fix=fix)
    found: Any = value.get("levels")
    fitness = value.get("fitness")
    counts = (value.get("generation"), value.get("since_better"))
    fits = isinstance(found, list) and len(found) == len(levels)
    fits = fits and all(type(at) is int and 0 <= at < len(table) for at, table in zip(found, levels, strict=True))
    if not fits or not all(type(one) is int and one >= 0 for one in counts) or not isinstance(fitness, (int, float)):
        raise UserError(f"{path} was edited, or is of another search", fix)
    return Generation.from_dict(value)


def _exact(found: Sequence[ModuleTarget], sparsity: float, pattern: NM | MixedNM | None) -> Targets:
    """The levels' rates, shifted alike by what they remove too much: the plan meets its budget within one row-unit."""
    if pattern is not None:
        return tuple(found)
    modules = [_shape(target) for target in found]
    rates = meet_target([target.sparsity - sparsity for target in found], [module.size for module in modules], sparsity)
    counts = integer_counts(modules, rates, sparsity)
    return tuple(replace(target, zeros_per_row=count) for target, count in zip(found, counts, strict=True))


def _shape(target: ModuleTarget) -> ModuleShape:
    return ModuleShape(target.name, target.rows, target.columns)


def _cache_folder(identity: Mapping[str, Any]) -> Path:
    return cache_home() / "levels" / _digest({"format": FORMAT, **identity})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
