"""Perplexity of the reference model under every allocation, pruner and sparsity, over several calibration seeds.

    python benchmarks/allocation_quality.py [-o benchmarks/results] [--preset tiny] [--seeds 3] [--fresh]

Every finished cell is stored at once; run it again to go on where it stopped. Allocations are measured once per seed on
the dense model, all in one pass; each cell then prunes a fresh copy. Beta of ``atp-search`` is chosen on the
validation split with the first seed's calibration text and kept for the others; the figures are from the test split.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.allocation import measure_layers, model_layers, plan_from_allocation
from sparsedeploy.allocation.atp import search_beta, trial_betas
from sparsedeploy.calibration.documents import load_documents
from sparsedeploy.calibration.driver import LayerContext
from sparsedeploy.calibration.samples import CalibrationSet, sample_tokens
from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json, write_text
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.loading import load_model
from sparsedeploy.models.tokenizer import load_tokenizer
from sparsedeploy.plan import SparsityPlan
from sparsedeploy.pruning.layers import prune_model
from sparsedeploy.quality.perplexity import perplexity, text_windows
from sparsedeploy.reference import reference_model
from sparsedeploy.registry import ALLOCATORS, PRUNERS
from sparsedeploy.reporting.plan_plot import profile

SPARSITIES = (0.5, 0.6, 0.7, 0.8)
METHODS = ("magnitude", "wanda", "sparsegpt")
ALLOCATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "uniform": ("uniform", {}),
    "owl": ("owl", {}),
    "dlp": ("dlp", {}),
    "dlp-mean": ("dlp", {"reduce": "mean"}),
    "alphapruning": ("alphapruning", {}),
    "alphapruning-intended": ("alphapruning", {"lower_bound": "intended"}),
    "atp": ("atp", {}),
    "atp-search": ("atp", {"search": "true"}),
    "lsa": ("lsa", {}),
    "lsa-block": ("lsa", {"granularity": "block"}),
    "lsa-projection": ("lsa", {"granularity": "projection"}),
    "rmi": ("rmi", {}),
}
# What the papers report at 70 % on 7B models (better, worse).
CLAIMS = [
    ("owl", "uniform"),
    ("dlp", "uniform"),
    ("dlp", "owl"),
    ("lsa", "uniform"),
    ("lsa", "owl"),
    ("lsa", "lsa-block"),
    ("lsa-block", "lsa-projection"),
    ("alphapruning", "uniform"),
    ("atp-search", "uniform"),
    ("atp-search", "alphapruning"),
    ("rmi", "uniform"),
]
READING = "<!-- What follows is written by hand and kept when the tables are made anew. -->\n"
DATA = "stdlib"
SETTINGS = {"sequences": 16, "length": 256, "context": 256, "windows": 32, "search_windows": 12}


class Bench:
    """The model, its texts and the file of finished cells."""

    def __init__(self, output: Path, preset: str, seeds: int, fresh: bool) -> None:
        folder = reference_model(preset)
        self.model = load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
        self.layers = model_layers(self.model)
        self.tokenizer = load_tokenizer(folder)
        self.test = self._windows("test", SETTINGS["windows"])
        self.validation = self._windows("validation", SETTINGS["search_windows"])
        self.seeds = range(seeds)
        self.path = output / f"allocation_quality{'' if preset == 'default' else f'_{preset}'}.json"
        header = {"data": DATA, "settings": SETTINGS, "model": {"name": folder.name, "sha256": model_sha256(folder)}}
        self.content: dict[str, Any] = {**header, "cells": {}, "betas": {}}
        if self.path.exists() and not fresh:
            stored = json.loads(self.path.read_text())
            if {key: stored[key] for key in header} != header:
                raise UserError(f"{self.path} is for another model or other settings", "Start anew: --fresh.")
            self.content = stored
        if "dense" not in self.content:
            self.content["dense"] = perplexity(self.model, self.test, batch_size=8).perplexity

    def _windows(self, split: str, count: int) -> torch.Tensor:
        windows = text_windows(DATA, self.tokenizer, SETTINGS["context"], split=split)
        return windows[:: max(1, len(windows) // count)][:count]  # from all over the split, not from its first files

    def calibration(self, seed: int) -> CalibrationSet:
        documents = load_documents(DATA, split="train")
        return sample_tokens(
            documents,
            self.tokenizer,
            sequences=SETTINGS["sequences"],
            length=SETTINGS["length"],
            seed=seed,
            data=DATA,
        )

    def measured(self, calibration: CalibrationSet) -> dict[str, list[Any]]:
        """What each allocation measures, all in one pass: a Hessian's diagonal holds the sums of squares."""
        allocators = {label: _allocator(label) for label in ALLOCATIONS}

        def reduce(layer: LayerContext) -> dict[str, Any]:
            return {label: allocator.measure(layer) for label, allocator in allocators.items()}

        by_layer = measure_layers(self.model, calibration.tokens, "hessian", reduce, name="all", batch_size=4)
        return {label: [layer[label] for layer in by_layer] for label in ALLOCATIONS}

    def plan(self, label: str, measured: list[Any], sparsity: float, beta: float | None = None) -> SparsityPlan:
        allocator = _allocator(label, beta)
        return plan_from_allocation(
            allocator.allocate(measured, self.layers, sparsity), self.layers, sparsity, allocation=label
        )

    def score(self, plan: SparsityPlan, method: str, calibration: CalibrationSet, windows: torch.Tensor) -> float:
        """Perplexity of a pruned copy; infinite when it has diverged."""
        candidate: nn.Module = copy.deepcopy(self.model)
        prune_model(candidate, calibration.tokens, plan, method, PRUNERS.get(method).make_options(), batch_size=4)
        try:
            return perplexity(candidate, windows, batch_size=8).perplexity
        except UserError:
            return math.inf

    def beta(self, method: str, sparsity: float) -> float:
        """The searched beta of ATP, once per method and sparsity, on the validation split."""
        key = f"{method}|{sparsity}"
        if key not in self.content["betas"]:
            calibration = self.calibration(0)
            depth: list[Any] = [None] * len(self.layers)
            found = search_beta(
                lambda plan: self.score(plan, method, calibration, self.validation),
                lambda beta: self.plan("atp", depth, sparsity, beta),
                trial_betas(sparsity, len(self.layers), at_most=16),
            )
            self.content["betas"][key] = {"beta": found.beta, "trials": found.to_dict()}
            self.save()
        return float(self.content["betas"][key]["beta"])

    def run(self) -> None:
        cells = self.content["cells"]
        wanted = [
            (seed, sparsity, method, label)
            for seed in self.seeds
            for sparsity in SPARSITIES
            for method in METHODS
            for label in ALLOCATIONS
            if seed == 0 or method != "magnitude" or _reads_text(label)
        ]
        calibration: CalibrationSet | None = None
        measured: dict[str, list[Any]] = {}
        for at, (seed, sparsity, method, label) in enumerate(wanted, 1):
            key = f"{label}|{method}|{sparsity}|{seed}"
            if key in cells:
                continue
            if calibration is None or calibration.seed != seed:
                calibration = self.calibration(seed)
                measured = self.measured(calibration)
                if seed == 0:
                    self.content["rates"] = {
                        label: profile(self.plan(label, measured[label], 0.7)).layers for label in ALLOCATIONS
                    }
            beta = self.beta(method, sparsity) if label == "atp-search" else None
            plan = self.plan(label, measured[label], sparsity, beta)
            start = time.perf_counter()
            value = self.score(plan, method, calibration, self.test)
            units = (plan.achieved - sparsity) * sum(t.size for t in plan.targets) / max(t.rows for t in plan.targets)
            cells[key] = {"perplexity": value if math.isfinite(value) else None, "row_units_off": units}
            self.save()
            print(
                f"{at}/{len(wanted)} {key} {value:.3f} ({time.perf_counter() - start:.1f} s)",
                flush=True,
            )
        self.save()

    def save(self) -> None:
        write_json(self.path, self.content)
        page = self.path.with_suffix(".md")
        kept = page.read_text().partition(READING)[2] if page.exists() else ""
        write_text(page, markdown(self.content) + (READING + kept if kept else ""))


def _allocator(label: str, beta: float | None = None) -> Any:
    name, values = ALLOCATIONS[label]
    method = ALLOCATORS.get(name)
    return method.function(method.make_options(values if beta is None else {"beta": beta}))


def _reads_text(label: str) -> bool:
    return ALLOCATORS.get(ALLOCATIONS[label][0]).traits["needs"] not in ("none", "weights")


def markdown(content: dict[str, Any]) -> str:
    """Mean and standard deviation over the seeds; the best of each column in bold."""
    cells = content["cells"]
    settings = content["settings"]
    lines = [
        "# Allocations compared on the reference model",
        "",
        f"Perplexity on held-out text of the standard library ({settings['windows']} windows of {settings['context']} "
        f"tokens from the test split), lower is better; dense {content['dense']:.2f}. Calibration: "
        f"{settings['sequences']} sequences of {settings['length']} tokens. Mean ± standard deviation over the "
        "calibration seeds (magnitude with an allocation that reads no text has nothing to repeat). Bold: the best.",
        "",
    ]
    for method in METHODS:
        sparsities = [s for s in SPARSITIES if any(key.split("|")[1:3] == [method, str(s)] for key in cells)]
        lines += [f"## {method}", "", "| allocation | " + " | ".join(f"{s:.0%}" for s in sparsities) + " |"]
        lines.append("|---" * (len(sparsities) + 1) + "|")
        table = {(label, s): _values(cells, label, method, s) for label in ALLOCATIONS for s in sparsities}
        best = {s: min(statistics.fmean(table[x, s]) for x in ALLOCATIONS if table[x, s]) for s in sparsities}
        for label in ALLOCATIONS:
            lines.append(f"| {label} | " + " | ".join(_cell(table[label, s], best[s]) for s in sparsities) + " |")
        lines.append("")
    lines += _orderings(cells)
    if content.get("rates"):
        lines += [
            "## Rates by layer at 70 %, first seed",
            "",
            "| allocation | " + " | ".join(str(i) for i in range(len(content["rates"]["uniform"]))) + " |",
            "|---" * (len(content["rates"]["uniform"]) + 1) + "|",
        ]
        lines += [
            f"| {label} | " + " | ".join(f"{rate:.3f}" for rate in rates) + " |"
            for label, rates in content["rates"].items()
            if label != "atp-search"
        ]
        lines.append("")
    worst = max((abs(cell["row_units_off"]) for cell in cells.values()), default=0.0)
    lines += [
        f"Weighted sparsity: over all {len(cells)} runs the zeros miss the target by at most {worst:.2f} row-units "
        "(one zero in every row of the tallest module).",
        "",
    ]
    if content["betas"]:
        lines += ["Searched beta of ATP, chosen on the validation split:", ""]
        lines += [
            f"- {key.replace('|', ', ')}: {found['beta']:.4f} after {len(found['trials'])} trials"
            for key, found in content["betas"].items()
        ]
        lines.append("")
    return "\n".join(lines)


def _values(cells: dict[str, Any], label: str, method: str, sparsity: float) -> list[float]:
    """The perplexities of all seeds, infinite where diverged."""
    start = f"{label}|{method}|{sparsity}|"
    found = [cell["perplexity"] for key, cell in cells.items() if key.startswith(start)]
    return [math.inf if value is None else value for value in found]


def _orderings(cells: dict[str, Any]) -> list[str]:
    """Where the papers' orderings hold here, with what is too small to tell counted apart."""
    lines = [
        "## The papers' orderings",
        "",
        "How many of the pruner and sparsity combinations above agree with what is published for 7B models at 70 %. A",
        "difference below the seeds' standard deviation or 0.5 % is counted as noise.",
        "",
        "| claim | holds | reversed | within noise | at 70 % |",
        "|---|---|---|---|---|",
    ]
    for better, worse in CLAIMS:
        verdicts: dict[tuple[str, float], str] = {}
        for method in METHODS:
            for sparsity in SPARSITIES:
                a, b = (_values(cells, label, method, sparsity) for label in (better, worse))
                if not a or not b:
                    continue
                gap = statistics.fmean(b) - statistics.fmean(a)
                noise = max([0.005 * min(*a, *b), *(statistics.stdev(x) for x in (a, b) if len(x) > 1)])
                verdicts[method, sparsity] = "noise" if abs(gap) <= noise else "holds" if gap > 0 else "reversed"
        counts = [list(verdicts.values()).count(word) for word in ("holds", "reversed", "noise")]
        at_70 = ", ".join(f"{method} {verdicts[method, 0.7]}" for method in METHODS if (method, 0.7) in verdicts)
        lines.append(f"| {better} better than {worse} | " + " | ".join(map(str, counts)) + f" | {at_70} |")
    return [*lines, ""]


def _cell(values: list[float], best: float) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    if not math.isfinite(mean):
        return "diverged"
    text = f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ± {statistics.stdev(values):.2f}"
    return f"**{text}**" if mean <= best else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--preset", default="default", help="which reference model: default or tiny")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fresh", action="store_true", help="forget the stored cells")
    arguments = parser.parse_args()
    progress.show(False)
    Bench(arguments.output, arguments.preset, arguments.seeds, arguments.fresh).run()


if __name__ == "__main__":
    main()
