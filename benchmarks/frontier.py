"""Perplexity against sparsity: pruning methods x allocations x rates on a real model, with the time of each beside it.

    python benchmarks/frontier.py MODEL CALIBRATION_TEXT TEST_TEXT [--cells "METHOD|ALLOCATION|RATE" ...] [--solve 15]

Every finished cell is stored at once; run it again to go on where it stopped. A method's name may end in ``+ls``: its
masks then get their least-squares weights (``--reconstruct``). Calibration: 8 sequences of 512 tokens; perplexity on
the first 60,000 bytes of the test text in windows of 512 tokens. Searched plans are compared on windows from the end of
the calibration text. ``--solve`` measures the solvers alone, interleaved, on the layers of the dense model.
"""

from __future__ import annotations

import copy
import math
import platform
import statistics as stats
import time
from pathlib import Path
from typing import Any

from cells import Setting, Store, frontier_chart, prune_cell, setting_parser

from sparsedeploy import progress
from sparsedeploy.calibration.driver import LayerDriver
from sparsedeploy.plan import ModuleTarget
from sparsedeploy.pruning.layers import prune_linear
from sparsedeploy.registry import PRUNERS
from sparsedeploy.reporting.charts import Chart

CELLS = [
    f"{method}|{allocation}|{rate}"
    for rate in (0.7, 0.6, 0.5, 0.8, 0.9)
    for allocation in ("uniform", "owl", "auto", "evolve")
    for method in ("wanda", "wanda+ls", "sparsegpt", "alps")
]
OPTIONS: dict[str, dict[str, Any]] = {"evolve": {"offspring": 8, "generations": 6, "confirm": 1}}


class Bench:
    """The setting and the file of finished cells."""

    def __init__(self, setting: Setting, output: Path, levels: Path) -> None:
        self.setting, self.levels = setting, levels
        machine = platform.processor() or platform.machine()
        self.store = Store(
            output / "frontier.json", setting.header(), markdown, picture=picture, beside={"machine": machine}
        )
        if "dense" not in self.store.content:
            dense = setting.perplexity(setting.dense_model())
            self.store.change(lambda content: content.update(dense=dense))

    def run(self, key: str) -> None:
        """One cell: plan, prune, measure."""
        method, allocation, rate = key.split("|")
        options = OPTIONS.get(allocation, {})
        cell = prune_cell(self.setting, method, allocation, rate, levels=self.levels, search_options=options)
        self.store.add(key, cell)
        print(f"{key} {cell['perplexity']} (plan {cell['plan_s']:.0f} s, prune {cell['prune_s']:.0f} s)", flush=True)

    def solve(
        self, methods: dict[str, tuple[str, dict[str, Any]]], layers: list[int], rate: float, repeats: int
    ) -> None:
        """CPU seconds of the solvers alone on the linears of some layers, interleaved; medians of the repeats."""
        driver = LayerDriver(self.setting.dense_model(), self.setting.calibration_set(0).tokens)
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
        solve = {
            "layers": layers,
            "rate": rate,
            "repeats": repeats,
            "seconds": {label: round(stats.median(values), 4) for label, values in times.items()},
            "loss": {label: loss for label, loss in losses.items() if loss},
        }
        self.store.change(lambda content: content.update(solve=solve))


def picture(content: dict[str, Any]) -> list[Chart]:
    """A line for each method and allocation."""
    found: dict[str, list[tuple[float, float]]] = {}
    for key, cell in sorted(content["cells"].items()):
        method, allocation, rate = key.split("|")
        if cell["perplexity"] is not None:
            found.setdefault(f"{method}, {allocation}", []).append((float(rate), cell["perplexity"]))
    return frontier_chart(found, content["dense"])


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
    parser = setting_parser(__doc__)
    parser.add_argument("--levels", type=Path, default=Path("levels"), help="where level databases are kept")
    parser.add_argument("--cells", nargs="*", default=CELLS)
    parser.add_argument("--solve", type=int, nargs="*", help="measure the solvers on these layers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="start no cell that should end later; exit code 3 if any is left")
    arguments = parser.parse_args()
    setting = Setting(arguments.model, arguments.calibration, arguments.test)
    progress.show(False)
    bench = Bench(setting, arguments.output, arguments.levels)
    if arguments.solve:
        bench.solve(SOLVERS, arguments.solve, 0.7, arguments.repeats)
    began = time.monotonic()
    lasted: dict[str, float] = {}
    for key in filter(bench.store.missing, arguments.cells):
        start, method = time.monotonic(), key.partition("|")[0]
        if arguments.seconds and start - began + lasted.get(method, 0) > arguments.seconds:
            raise SystemExit(3)
        bench.run(key)
        lasted[method] = time.monotonic() - start


if __name__ == "__main__":
    main()
