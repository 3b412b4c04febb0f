"""Perplexity against sparsity: pruning methods x allocations x rates on a model, with the time of each beside it.

    python benchmarks/frontier.py MODEL CALIBRATION_TEXT TEST_TEXT [--cells "METHOD|ALLOCATION|RATE" ...] [--solve 15]

Every finished cell is stored at once; run it again to go on where it stopped. A method's name may end in ``+ls``: its
masks then get their least-squares weights (``--reconstruct``). Calibration: 8 sequences of 512 tokens; perplexity on
the first 60,000 bytes of the test text in windows of 512 tokens. Searched plans are compared on windows from the end of
the calibration text. Cells and trained models that benchmarks/real_model.py has measured in the same setting are taken
over from results/real_model.json. ``--solve`` measures the solvers alone, interleaved, on the layers of the dense
model. Writes results/frontier_MODEL.json, .md and .svg.
"""

from __future__ import annotations

import copy
import math
import platform
import statistics as stats
import time
from pathlib import Path
from typing import Any

from cells import Setting, Store, prune_cell, read_measured, setting_parser
from real_model import METHODS, RECOVERIES

from sparsedeploy import progress
from sparsedeploy.calibration.driver import LayerDriver
from sparsedeploy.plan import ModuleTarget
from sparsedeploy.pruning.layers import prune_linear
from sparsedeploy.registry import PRUNERS
from sparsedeploy.reporting.charts import Chart, Series, line_chart

CELLS = [
    f"{method}|{allocation}|{rate}"
    for rate in (0.7, 0.6, 0.5, 0.8, 0.9)
    for allocation in ("uniform", "owl", "auto", "evolve")
    for method in ("wanda", "wanda+ls", "sparsegpt", "alps")
]
COMBINATIONS = [name for name, row in RECOVERIES.items() if row.method != "lora" and (row.sparsity or 1) > 0.1]
OPTIONS: dict[str, dict[str, Any]] = {"evolve": {"offspring": 8, "generations": 6, "confirm": 1}}


class Bench:
    """The setting and the file of finished cells."""

    def __init__(self, setting: Setting, output: Path, levels: Path) -> None:
        self.setting, self.levels = setting, levels
        header = setting.header()
        machine = platform.processor() or platform.machine()
        path = output / f"frontier_{setting.model.name}.json"
        self.store = Store(path, header, markdown, picture=picture, beside={"machine": machine})
        if "dense" not in self.store.content:
            dense = setting.perplexity(setting.dense_model())
            self.store.change(lambda content: content.update(dense=dense))
        self.adopt(output / "real_model.json", header)

    def adopt(self, path: Path, header: dict[str, Any]) -> None:
        """Take over what benchmarks/real_model.py has measured in the same setting.

        Without LoRA, whose factors stay beside the weights, and without the dense models that were trained.
        """
        if (found := read_measured(path, header)) is None:
            return
        cells, trained = {}, {}
        for key, cell in found["cells"].items():
            part, *rest = key.split("|")
            if part == "allocation" and rest[2].startswith("0.") and rest[3] == "0":
                cells["|".join(rest[:3])] = cell
            elif part == "recovery" and rest[1] == "0" and rest[0] in COMBINATIONS and cell.get("tokens"):
                trained[rest[0]] = {
                    "label": RECOVERIES[rest[0]].label,
                    "rate": 1 - cell.get("effective_density", 1 - cell["sparsity"]),
                    **{name: cell[name] for name in ("perplexity", "tokens", "cpu_seconds")},
                    "learning_rate": cell["training"]["learning_rate"],
                }
        new = {key: cell for key, cell in cells.items() if self.store.missing(key)}
        if new or trained != self.store.content.get("trained"):
            self.store.change(lambda content: content.update(cells={**content["cells"], **new}, trained=trained))

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
    """Each method at uniform rates and with the best allocation of each rate; the best trained model of each rate.

    Magnitude is left out: it would hide the distances between the others.
    """
    found: dict[str, dict[float, float]] = {}

    def add(line: str, rate: float, value: float | None) -> None:
        if value is not None:
            at = found.setdefault(line, {})
            at[rate] = min(value, at.get(rate, math.inf))

    cells = [(*key.split("|"), cell["perplexity"]) for key, cell in content["cells"].items()]
    searched = {(method, rate) for method, allocation, rate, _ in cells if allocation != "uniform"}
    for method, allocation, rate, value in cells:
        if method not in METHODS[1:]:
            continue
        if allocation == "uniform":
            add(f"{method}, uniform", float(rate), value)
        if (method, rate) in searched:
            add(f"{method}, best allocation", float(rate), value)
    for row in content.get("trained", {}).values():
        add("the best trained model", round(row["rate"], 3), row["perplexity"])
    lines = [
        Series(name, [(100 * rate, value) for rate, value in sorted(at.items())])
        for name, at in sorted(found.items(), reverse=True)
        if len(at) > 1
    ]
    if not lines:
        return []
    title = f"Perplexity against sparsity, {content['model']['name']} (dense {content['dense']:.2f})"
    return [line_chart(lines, title=title, x_label="sparsity, %", y_label="perplexity, log scale", log_y=True)]


def markdown(content: dict[str, Any]) -> str:
    """One table per rate; the lowest perplexity of each in bold."""
    cells = {tuple(key.split("|")): cell for key, cell in content["cells"].items()}
    calibration = content["calibration"]
    lines = [
        "# The frontier: perplexity against sparsity",
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
    if trained := content.get("trained"):
        lines += [
            "## Trained",
            "",
            "| rate | | perplexity | training tokens | learning rate | CPU time |",
            "|---:|---|---:|---:|---:|---:|",
        ]
        for row in sorted(trained.values(), key=lambda row: (round(row["rate"], 3), row["perplexity"] or math.inf)):
            value = "diverged" if row["perplexity"] is None else f"{row['perplexity']:.2f}"
            lines.append(
                f"| {row['rate']:.0%} | {row['label']} | {value} | {row['tokens']:,} | {row['learning_rate']} "
                f"| {row['cpu_seconds']:.0f} s |"
            )
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
