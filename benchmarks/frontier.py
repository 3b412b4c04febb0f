"""Perplexity against sparsity: pruning methods x allocations x rates on a real model, with the time of each beside it.

    python benchmarks/frontier.py MODEL CALIBRATION_TEXT TEST_TEXT [--cells "METHOD|ALLOCATION|RATE" ...] [--solve 15]

Every finished cell is stored at once; run it again to go on where it stopped. A method's name may end in ``+ls``: its
masks then get their least-squares weights (``--reconstruct``). Calibration: 8 sequences of 512 tokens; perplexity on
the first 60,000 bytes of the test text in windows of 512 tokens. Searched plans are compared on windows from the end of
the calibration text. ``--solve`` measures the solvers alone, interleaved, on the layers of the dense model.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics as stats
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sparsedeploy import progress
from sparsedeploy.allocation.allocate import allocate
from sparsedeploy.calibration.driver import LayerDriver
from sparsedeploy.calibration.samples import CalibrationSet, sample_tokens
from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json, write_text
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.loading import load_model
from sparsedeploy.models.tokenizer import load_tokenizer
from sparsedeploy.plan import ModuleTarget, SparsityPlan
from sparsedeploy.pruning.layers import prune_linear, prune_model
from sparsedeploy.quality.perplexity import perplexity, windows_of
from sparsedeploy.registry import ALLOCATORS, PRUNERS
from sparsedeploy.workflows.search import search_plan

CONTEXT, SEQUENCES, TEST_BYTES = 512, 8, 60_000
SELECTION = {"windows": 8, "context": 256}
CELLS = [
    f"{method}|{allocation}|{rate}"
    for rate in (0.7, 0.6, 0.5, 0.8, 0.9)
    for allocation in ("uniform", "owl", "auto", "evolve")
    for method in ("wanda", "wanda+ls", "sparsegpt", "alps")
]
OPTIONS: dict[str, dict[str, Any]] = {"evolve": {"offspring": 8, "generations": 20}}
READING = "<!-- What follows is written by hand and kept when the tables are made anew. -->\n"


class Bench:
    """The model, its texts and the file of finished cells."""

    def __init__(self, model: Path, calibration: Path, test: Path, output: Path, levels: Path) -> None:
        self.folder, self.levels = model, levels
        tokenizer = load_tokenizer(model)
        text = calibration.read_text(encoding="utf-8")
        self.calibration: CalibrationSet = sample_tokens(
            [text], tokenizer, sequences=SEQUENCES, length=CONTEXT, seed=0, data=calibration.name
        )
        self.selection = _windows(text[-100_000:], tokenizer, SELECTION["context"])[: SELECTION["windows"]]
        self.test = _windows(test.read_bytes()[:TEST_BYTES].decode(errors="ignore"), tokenizer, CONTEXT)
        header = {
            "model": {"name": model.name, "sha256": model_sha256(model)},
            "calibration": asdict(self.calibration.describe()),
            "test": {"data": test.name, "bytes": TEST_BYTES, "context": CONTEXT},
            "selection": SELECTION,
        }
        self.path = output / "frontier.json"
        self.content: dict[str, Any] = {**header, "machine": platform.processor() or platform.machine(), "cells": {}}
        if self.path.exists():
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if {key: stored[key] for key in header} != header:
                raise UserError(f"{self.path} is for another model or text", "Name another folder: -o.")
            self.content = stored
        if "dense" not in self.content:
            self.content["dense"] = perplexity(load_model(model, dtype=torch.float32), self.test).perplexity
            self.save()

    def run(self, key: str) -> None:
        """One cell: plan, prune, measure."""
        method, allocation, rate = key.split("|")
        name, _, ending = method.partition("+")
        pruner = PRUNERS.get(name)
        options = pruner.make_options()
        model = load_model(self.folder, dtype=torch.float32)
        began, used = time.perf_counter(), time.process_time()
        plan = self.plan(model, name, allocation, float(rate), reconstruct=bool(ending))
        planned, planned_used = time.perf_counter(), time.process_time()
        prune_model(model, self.calibration.tokens, plan, name, options, reconstruct=bool(ending))
        pruned, pruned_used = time.perf_counter(), time.process_time()
        try:
            value = perplexity(model, self.test, batch_size=4).perplexity
        except UserError:  # its only reason: the pruned model has diverged
            value = math.inf
        self.content["cells"][key] = {
            "perplexity": value if math.isfinite(value) else None,
            "achieved": plan.achieved,
            "plan_s": round(planned - began, 1),
            "prune_s": round(pruned - planned, 1),
            "plan_cpu_s": round(planned_used - used, 1),
            "prune_cpu_s": round(pruned_used - planned_used, 1),
            "search": plan.details.get("search"),
        }
        self.save()
        print(f"{key} {value:.2f} (plan {planned - began:.0f} s, prune {pruned - planned:.0f} s)", flush=True)

    def plan(self, model: Any, method: str, allocation: str, rate: float, *, reconstruct: bool) -> SparsityPlan:
        chosen = ALLOCATORS.get(allocation)
        tokens = self.calibration.tokens
        if not chosen.traits.get("searches"):
            return allocate(model, tokens, rate, None, allocation, chosen.make_options())
        folder = self.levels / f"{self.folder.name}-{method}{'-ls' if reconstruct else ''}"
        return search_plan(
            model,
            tokens,
            self.selection,
            rate,
            None,
            allocation,
            chosen.make_options({"database": str(folder), **OPTIONS.get(allocation, {})}),
            method=method,
            method_options=PRUNERS.get(method).make_options(),
            identity={"model": self.content["model"], "calibration": self.content["calibration"], "method": method},
            reconstruct=reconstruct,
        )

    def solve(
        self, methods: dict[str, tuple[str, dict[str, Any]]], layers: list[int], rate: float, repeats: int
    ) -> None:
        """CPU seconds of the solvers alone on the linears of some layers, interleaved; medians of the repeats."""
        model = load_model(self.folder, dtype=torch.float32)
        driver = LayerDriver(model, self.calibration.tokens)
        times: dict[str, list[float]] = {label: [] for label in methods}
        losses: dict[str, float] = dict.fromkeys(methods, 0.0)
        for layer in driver.iterate("hessian", changes_weights=False):
            if layer.index not in layers:
                continue
            for repeat in range(repeats + 1):
                for label, (name, values) in methods.items():
                    pruner = PRUNERS.get(name)
                    options, spent = pruner.make_options(values), 0.0
                    fresh = {id(s): copy.deepcopy(s) for s in layer.statistics.values()}  # a solver may consume them
                    for module, linear in layer.linears.items():
                        zeros = round(rate * linear.in_features)
                        target = ModuleTarget(module, linear.out_features, linear.in_features, zeros)
                        start = time.process_time()
                        pruned = prune_linear(
                            pruner, linear, fresh[id(layer.statistics[module])], target, options, label.endswith("+ls")
                        )
                        spent += time.process_time() - start
                        losses[label] += (pruned.loss or 0.0) * (repeat == 0)
                    if repeat:  # the first one warms up
                        times[label].append(spent)
            if layer.index >= max(layers):
                break
        self.content["solve"] = {
            "layers": layers,
            "rate": rate,
            "repeats": repeats,
            "seconds": {label: round(stats.median(values), 4) for label, values in times.items()},
            "loss": {label: loss for label, loss in losses.items() if loss},
        }
        self.save()

    def save(self) -> None:
        write_json(self.path, self.content)
        page = self.path.with_suffix(".md")
        kept = page.read_text(encoding="utf-8").partition(READING)[2] if page.exists() else ""
        write_text(page, markdown(self.content) + (READING + kept if kept else ""))


def _windows(text: str, tokenizer: Any, context: int) -> torch.Tensor:
    return windows_of(tokenizer(text, verbose=False)["input_ids"], context, "text")


def markdown(content: dict[str, Any]) -> str:
    """One table per rate; the lowest perplexity of each in bold."""
    cells = {tuple(key.split("|")): cell for key, cell in content["cells"].items()}
    calibration = content["calibration"]
    lines = [
        "# The frontier: perplexity against sparsity on a real model",
        "",
        f"{content['model']['name']}, calibrated on {calibration['sequences']} sequences of {calibration['length']} "
        f"tokens of {calibration['data']}; perplexity on the first {content['test']['bytes']:,} bytes of "
        f"{content['test']['data']} in windows of {content['test']['context']}; dense {content['dense']:.2f}. `+ls`: "
        "with `--reconstruct`. CPU seconds of making the plan and of pruning beside it.",
        "",
    ]
    for rate in sorted({rate for _, _, rate in cells}):
        here = {key[:2]: cell for key, cell in cells.items() if key[2] == rate}
        best = min((c["perplexity"] for c in here.values() if c["perplexity"] is not None), default=math.inf)
        lines += [
            f"## {float(rate):.0%}",
            "",
            "| method | allocation | perplexity | plan | prune |",
            "|---|---|---|---|---|",
        ]
        for (method, allocation), cell in sorted(here.items()):
            value = cell["perplexity"]
            text = "diverged" if value is None else f"**{value:.2f}**" if value <= best else f"{value:.2f}"
            chosen = f" ({cell['search']['chosen']})" if cell["search"] and allocation == "auto" else ""
            times = f"{cell['plan_cpu_s']:.0f} s | {cell['prune_cpu_s']:.0f} s"
            lines.append(f"| {method} | {allocation}{chosen} | {text} | {times} |")
        lines.append("")
    if solve := content.get("solve"):
        base = solve["seconds"]["sparsegpt"]
        lines += [
            "## The solvers alone",
            "",
            f"Layers {', '.join(map(str, solve['layers']))} of the dense model at {solve['rate']:.0%}: CPU seconds per "
            f"layer (median of {solve['repeats']} interleaved rounds), and the error next to SparseGPT's.",
            "",
            "| solver | seconds | times SparseGPT | error |",
            "|---|---|---|---|",
        ]
        for label, seconds in solve["seconds"].items():
            error = solve["loss"][label] / solve["loss"]["sparsegpt"] if label in solve["loss"] else None
            lines.append(
                f"| {label} | {seconds:.3f} | {seconds / base:.2f} | {'' if error is None else f'{error:.3f}'} |"
            )
        lines.append("")
    return "\n".join(lines)


SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sparsegpt": ("sparsegpt", {}),
    "alps": ("alps", {}),
    "alps by row": ("alps", {"scope": "row"}),
    "alps, the paper's schedule": (
        "alps",
        {"schedule": "paper", "penalty": 0.1, "relaxation": 1.0, "iterations": 10},
    ),
    "sparsegpt+ls": ("sparsegpt", {}),
    "wanda+ls": ("wanda", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--levels", type=Path, default=Path("levels"), help="where level databases are kept")
    parser.add_argument("--cells", nargs="*", default=CELLS)
    parser.add_argument("--solve", type=int, nargs="*", help="measure the solvers on these layers")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    progress.show(False)
    bench = Bench(arguments.model, arguments.calibration, arguments.test, arguments.output, arguments.levels)
    if arguments.solve:
        bench.solve(SOLVERS, arguments.solve, 0.7, arguments.repeats)
    for key in arguments.cells:
        if key not in bench.content["cells"]:
            bench.run(key)


if __name__ == "__main__":
    main()
