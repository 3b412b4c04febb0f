"""The file of a sweep: a model and a grid of what to try, checked before anything runs."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsedeploy.calibration.documents import is_named
from sparsedeploy.conversion import build_options, shown
from sparsedeploy.errors import UserError
from sparsedeploy.models.loading import resolve_model
from sparsedeploy.options import Options, described, option
from sparsedeploy.paths import check_regular, expand
from sparsedeploy.plan import parse_pattern
from sparsedeploy.quality.evaluate import named_texts
from sparsedeploy.quality.options import EvalOptions, TextOptions
from sparsedeploy.registry import RECOVERIES
from sparsedeploy.workflows.recipes import parse_recipe, read_yaml

DENSE = "dense"
# What a cell's folder is called: nothing that leads elsewhere or hides.
_FOLDER = re.compile(r"[\w+][\w+.-]{0,200}", re.ASCII)


@dataclass(frozen=True)
class SweepOptions(Options):
    """A sweep file's lines. An entry of ``methods``, ``allocations`` or ``recoveries`` is a name, or a mapping with
    ``method`` or ``allocation`` and what else that section of a recipe takes.

    Attributes:
        calibration, train: sections as in a recipe, for all cells.
    """

    model: str = option("", "Model folder or hub id.")
    rates: tuple[Any, ...] = option((), "Sparsities and N:M patterns.")
    methods: tuple[Any, ...] = option(("wanda",), "Pruning methods.")
    allocations: tuple[Any, ...] = option(("uniform",), "Allocations; N:M patterns are always uniform.")
    recoveries: tuple[Any, ...] = option(("none",), "Recoveries of every pruned model; none is always there.")
    calibration: Mapping[str, Any] | None = option(None, "Calibration text.")
    train: Mapping[str, Any] | None = option(None, "Training text.")
    eval: Mapping[str, Any] | None = option(None, "The text that perplexity is measured on.")


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
        name: of its folder.
        recipe: the sections that prune it; empty for the dense model.
        recover: the section that recovers ``base``; None for a cell that is only pruned.
        base: the cell that it starts from.
    """

    name: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recover: Mapping[str, Any] | None = None
    base: str | None = None


@dataclass(frozen=True)
class Sweep:
    """A checked sweep.

    Attributes:
        train: values of the training text's options; ``calibration`` the text that all cells read, where one is named.
    """

    model: str
    folder: Path
    cells: tuple[Cell, ...]
    train: Mapping[str, Any]
    quality: EvalOptions
    calibration: str | None = None


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        UserError: no such file, not YAML, an unknown line, or a method, option or rate that cannot be.
    """
    value = read_yaml(path, "sweep", f"Its lines: {', '.join(_lines())}.")
    if not isinstance(value, dict):
        raise UserError(f"sweep {path} is not a mapping", f"Its lines: {', '.join(_lines())}.")
    if unknown := [key for key in value if key not in _lines()]:
        raise UserError(f"sweep {path}: unknown line {shown(unknown[0])}", f"Known: {', '.join(_lines())}.")
    lines: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in value.items()}
    options = SweepOptions(**lines)
    for name in ("rates", "methods", "allocations", "recoveries"):
        if not isinstance(getattr(options, name), tuple) or not getattr(options, name):
            raise UserError(f"sweep {path}: {name} is not a list", f"Write it as {name}: [...].")
    if not isinstance(options.model, str):
        raise UserError(f"sweep {path}: model is {shown(options.model)}", "Name a model folder or hub id.")
    if not options.model or not isinstance(options.eval, Mapping) or not options.eval.get("data"):
        raise UserError(f"sweep {path} names no model or no text to evaluate on", "Add model: and eval: {data: TEXT}.")
    texts = {name: text for name in ("calibration", "train") if (text := getattr(options, name))}
    sections = parse_recipe({"prune": {}, **texts}, path.name).sections
    train = sections.get("train", {})
    if "seed" in train:
        raise UserError(
            f"sweep {path}: train sets seed, which is the recovery's", "Give the entry of recoveries a line seed:."
        )
    quality = _quality(options.eval, f"sweep {path}: eval")
    for text in named_texts(quality.text.data).values():
        _check_text(text, f"sweep {path}", "evaluate on")
    for name, purpose in (("calibration", "calibrate on"), ("train", "train on")):
        if text := sections.get(name, {}).get("data"):
            _check_text(text, f"sweep {path}", purpose)
    cells = tuple(_cells(options, path.name))
    for cell in cells:
        if not _FOLDER.fullmatch(cell.name):
            raise UserError(
                f"sweep {path}: {shown(cell.name)} cannot be a folder's name",
                "Give the entry a line name: of at most 60 letters, digits, dots and dashes.",
            )
    # Some file systems take A and a for one name.
    if twice := [name for name, count in Counter(cell.name.lower() for cell in cells).items() if count > 1]:
        raise UserError(f"sweep {path} names the cell {twice[0]} twice", "Give each entry a line name: of its own.")
    measured = sections.get("calibration", {}).get("data")
    return Sweep(options.model, resolve_model(options.model), cells, train, quality, measured)


def _check_text(text: str, where: str, purpose: str) -> None:
    """Refuse a text that is not there before anything is computed."""
    check_regular(expand(text))
    if not is_named(text) and not expand(text).exists():
        raise UserError(f"{where}: no text at '{text}' to {purpose}", "Name a file, a folder, stdlib or c4.")


def _quality(values: Mapping[str, Any], where: str) -> EvalOptions:
    """The options of ``eval``, those of its text among them."""
    own = {item.name for item in described(TextOptions)}
    text = build_options(where, TextOptions, {name: value for name, value in values.items() if name in own})
    rest = {name: value for name, value in values.items() if name not in own}
    return replace(build_options(where, EvalOptions, rest), text=text)


def _lines() -> list[str]:
    return [item.name for item in described(SweepOptions)]


def _cells(options: SweepOptions, where: str) -> Iterator[Cell]:
    """The dense model, then every pruned cell, each before what recovers it."""
    yield Cell(DENSE)
    recoveries = [_entry(each, "method") for each in options.recoveries if each != "none"]
    seen: set[str] = set()
    rates = [_rate(each, where) for each in options.rates]
    for rate, method, allocation in itertools.product(rates, options.methods, options.allocations):
        if not isinstance(rate, str) and not 0 <= rate < 1:
            raise UserError(
                f"sweep {where}: the rate {shown(rate)} is outside [0, 1)",
                "Give the part that is removed, such as 0.5; write patterns in quotes: '2:4'.",
            )
        pattern = rate if isinstance(rate, str) and ":" in rate else None
        target = {"pattern": pattern} if pattern else {"sparsity": rate}
        spread, how = _entry(allocation, "allocation"), _entry(method, "method")
        if own := [key for key in ("sparsity", "pattern", "plan") if key in how or key in spread]:
            raise UserError(f"sweep {where}: an entry sets {own[0]}", "Leave that to the line rates.")
        if pattern and not pattern.startswith("mixed"):
            spread = {"allocation": "uniform"}
        names = [_name(how, "method"), _name(spread, "allocation")]
        sections: dict[str, Any] = {"prune": {**target, **how, **spread}}
        if options.calibration:
            sections["calibration"] = dict(options.calibration)
        checked = parse_recipe(sections, where).sections["prune"]  # refuses what cannot be
        base = "-".join(str(name) for name in (*names, _rate_name(rate)))
        if base in seen and pattern:
            continue  # the same pattern under another allocation
        seen.add(base)
        yield Cell(base, sections)
        if recoveries and checked.get("lm_head"):
            raise UserError(
                f"sweep {where}: recovery does not keep a pruned output head sparse",
                "Leave lm_head out, or give it a sweep without recoveries.",
            )
        for each in recoveries:
            recover = dict(each)
            name = _name(recover, "method")
            parse_recipe({"recover": recover}, where)
            if RECOVERIES.get(recover["method"]).traits["trains"] and not (options.train or {}).get("data"):
                raise UserError(
                    f"sweep {where}: {recover['method']} trains and there is no text", "Add train: {data: TEXT}."
                )
            yield Cell(f"{base}-{name}", {}, recover, base)


def _entry(value: Any, key: str) -> dict[str, Any]:
    """An entry as a mapping."""
    if isinstance(value, str):
        return {key: value}
    if isinstance(value, Mapping) and isinstance(value.get(key), str):
        return dict(value)
    raise UserError(f"a sweep's entry is {shown(value)}", f"It takes a name, or a mapping with {key}:.")


def _name(entry: dict[str, Any], key: str) -> str:
    """What cells are called after an entry, taken out of it."""
    name = entry.pop("name", entry[key])
    if not isinstance(name, str):
        raise UserError(f"a sweep's entry has the name {shown(name)}", "Write the name as text.")
    return name


def _rate(value: Any, where: str) -> float | str:
    """A sparsity, in quotes or not, or a pattern."""
    if isinstance(value, str):
        value = value.strip()
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or (isinstance(value, str) and ":" in value)):
        raise UserError(f"sweep {where}: a rate is {shown(value)}", "Give numbers and patterns, such as [0.5, '2:4'].")
    return value


def _rate_name(rate: Any) -> str:
    if isinstance(rate, str):
        parse_pattern(rate)
        return rate.replace(":", "of")
    return f"{100 * rate:g}"
