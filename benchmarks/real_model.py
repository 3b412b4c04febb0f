"""What pruning and recovery do to a real pretrained model: the tables behind the README and the guide.

One script of more than 400 lines, because the five parts share their cells, their shards and one results file.

    python benchmarks/real_model.py MODEL CALIBRATION_TEXT TEST_TEXT [--parts allocation samples recovery tasks cost]
        [--train TEXT] [--shard 1/2] [--limit-minutes 5] [--cells "PART|..." ...]

- allocation: every allocation x magnitude, Wanda, SparseGPT and ALPS at 50, 60 and 70 % and at mixed 2:8; uniform with
  three seeds of the calibration text. 8 sequences of 512 tokens; perplexity on the first 60,000 bytes of the test text
  in windows of 512.
- samples: the same at 70 %, uniform, with fewer and more calibration sequences.
- recovery: at 70 %, 200 training pieces of 256 tokens for every method that trains, 16 calibration sequences of 256;
  the same test text in windows of 512. Each cell is a process of its own, for its peak memory.
- tasks: accuracy on the task that is shipped, dense and pruned by each method.
- cost: time and peak memory of pruning beside llm-compressor and a plain two-pass loop (`--peer-python`).

Cells that benchmarks/frontier.py has measured in the same setting are taken over from results/frontier_MODEL.json.

Every finished cell is stored at once; run it again to go on where it stopped. Two processes with `--shard 1/2` and
`--shard 2/2` fill one file together. On two cores everything takes a night. Writes results/real_model.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cells import ALL_WEIGHTS, RECOVERIES_COMPARED, Recovery, Setting, Store, prune_cell, read_measured, recovery_cell

from sparsedeploy import progress

METHODS = ("magnitude", "wanda", "sparsegpt", "alps")
ALLOCATIONS = ("uniform", "owl", "dlp", "alphapruning", "lsa", "atp", "rmi")
LEVELS = ("0.7", "0.5", "0.6", "mixed-2:8")
SEEDS = {"uniform": 3}
SAMPLES = (2, 32, 128)  # beside the 8 of every other cell
TASKS = ("python_lines",)


def varied(
    name: str,
    rate: float,
    learning_rate: float | None = None,
    *,
    note: str = "",
    setting: Mapping[str, Any] | None = None,
    **changed: Any,
) -> Recovery:
    """A row of every table at a rate that its label names, and with what else differs."""
    row, setting = RECOVERIES_COMPARED[name], setting or {}
    training = {**row.setting.get("training", {}), **setting.get("training", {})}
    if learning_rate is not None:
        training["learning_rate"] = learning_rate
    label = f"{row.label}, {round(100 * rate)} %{note}"
    return replace(row, label=label, sparsity=rate, setting={**row.setting, **setting, "training": training}, **changed)


LONG = {"train_sequences": 400, "training": {"batch_size": 2}}  # twice the tokens in four times the steps
RECOVERIES = {
    "wanda": Recovery("Wanda alone", None, "wanda"),
    "sparsegpt": Recovery("SparseGPT alone", None, "sparsegpt"),
    "alps": Recovery("ALPS alone", None, "alps"),
    "dense-trained": Recovery("the dense model trained alike (1 % pruned)", "sparse-lora", "magnitude", sparsity=0.01),
    "dense-elsa": Recovery(
        "the dense model, all weights trained alike (1 % pruned)",
        "elsa",
        "magnitude",
        sparsity=0.01,
        setting=ALL_WEIGHTS,
    ),
    **RECOVERIES_COMPARED,
    "sparselo": Recovery("Wanda + SparseLo, rank 32 on top", "sparselo", "wanda", {"rank": 32}),
    "sparselo-equal": Recovery(
        "Wanda + SparseLo, rank 32 within 30 %", "sparselo", "wanda", {"rank": 32}, sparsity=None
    ),
    "alps-sparse-lora-1e-3": varied("alps-sparse-lora", 0.7, 1e-3),
    "alps-sparse-lora-3e-3": varied("alps-sparse-lora", 0.7, 3e-3),
    "elsa-2e-3": varied("elsa", 0.7, 2e-3),
    "alps-sparse-lora-50": varied("alps-sparse-lora", 0.5),
    "elsa-50": varied("elsa", 0.5),
    "elsa-60": varied("elsa", 0.6),
    "elsa-80": varied("elsa", 0.8),
    "sparsegpt-sparse-lora-90": varied("sparsegpt-sparse-lora", 0.9),
    "sparsegpt-sparse-lora-90-1e-3": varied("sparsegpt-sparse-lora", 0.9, 1e-3),
    "sparsegpt-sparse-lora-90-3e-3": varied("sparsegpt-sparse-lora", 0.9, 3e-3),
    "sparsegpt-sparse-lora-90-long": varied("sparsegpt-sparse-lora", 0.9, setting=LONG),
    "sparsegpt-sparse-lora-90-long-1e-3": varied("sparsegpt-sparse-lora", 0.9, 1e-3, setting=LONG),
    "alps-sparse-lora-90": varied("alps-sparse-lora", 0.9),
    "elsa-90": varied("elsa", 0.9),
    "elsa-90-3e-4": varied("elsa", 0.9, 3e-4),
    "elsa-90-2e-3": varied("elsa", 0.9, 2e-3),
    "elsa-90-fixed": varied("elsa", 0.9, note=", the mask stays", options={"settle": 1.0}),
    "elsa-90-dlp": varied("elsa", 0.9, note=", dlp", allocation="dlp"),
    "elsa-90-long": varied("elsa", 0.9, setting=LONG),
}
RECOVERY_SEEDS = 2
RECOVERY: dict[str, Any] = {
    "sequences": 16,
    "length": 256,
    "train_sequences": 200,
    "dropout": 0.0,
    "training": {
        "learning_rate": 1e-2,
        "warmup_ratio": 0.1,
        "weight_decay": 0.0,
        "clip": 1.0,
        "batch_size": 4,
        "accumulation": 1,
    },
}
COST: dict[str, Any] = {"methods": ("wanda", "sparsegpt"), "samples": 8, "length": 256, "rounds": 1}
RESULT = "real_model.json"


def all_cells(parts: list[str]) -> list[str]:
    """The keys of every cell, the most telling first."""
    by_part = {
        "allocation": [
            f"allocation|{method}|{allocation}|{level}|{seed}"
            for seed in range(max(SEEDS.values()))
            for level in LEVELS
            for allocation in ALLOCATIONS
            for method in METHODS
            if seed < SEEDS.get(allocation, 1)
        ],
        "samples": [f"samples|{method}|{count}" for count in SAMPLES for method in METHODS[1:]],
        "recovery": [f"recovery|{name}|{seed}" for seed in range(RECOVERY_SEEDS) for name in RECOVERIES],
        "tasks": ["tasks|dense|0"] + [f"tasks|{method}|{level}" for level in ("0.5", "0.7") for method in METHODS],
        "cost": [f"cost|{method}" for method in COST["methods"]],
    }
    return [key for part in parts for key in by_part[part]]


class Bench:
    """The setting, the texts and the file of finished cells."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.setting = Setting(arguments.model, arguments.calibration, arguments.test)
        train: Path = arguments.train or arguments.calibration
        header = {**self.setting.header(), "recovery": {**RECOVERY, "train": train.name}}
        self.train = train
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        self.store = Store(arguments.output / RESULT, header, markdown, beside={"machine": machine})
        self.adopt(arguments.output / f"frontier_{arguments.model.name}.json", header)

    def adopt(self, path: Path, header: dict[str, Any]) -> None:
        """Take over what benchmarks/frontier.py has measured in the same setting."""
        if (found := read_measured(path, header)) is None:
            return
        cells = {f"allocation|{key}|0": cell for key, cell in found["cells"].items()}
        cells["dense"] = {"perplexity": found["dense"]}
        wanted = {"dense", *all_cells(["allocation"])}
        new = {key: cell for key, cell in cells.items() if key in wanted and self.store.missing(key)}
        if new:
            self.store.change(lambda content: content["cells"].update(new))

    def run(self, key: str) -> None:
        """Measure one cell and store it."""
        began = time.perf_counter()
        cell = self.cell(key)
        self.store.add(key, cell)
        print(f"{key}: {summary(cell)} ({time.perf_counter() - began:.0f} s)", flush=True)

    def cell(self, key: str) -> dict[str, Any]:
        part, *rest = key.split("|")
        setting = self.setting
        if key == "dense":
            return {"perplexity": setting.perplexity(setting.dense_model())}
        if part == "allocation":
            method, allocation, level, seed = rest
            return prune_cell(setting, method, allocation, level, seed=int(seed))
        if part == "samples":
            method, count = rest
            return prune_cell(replace(setting, sequences=int(count)), method, "uniform", "0.7")
        if part == "tasks":
            method, level = rest
            if method == "dense":
                return {"tasks": setting.accuracy(setting.dense_model(), TASKS)}
            return prune_cell(setting, method, "uniform", level, tasks=TASKS)
        if part == "cost":
            return self.cost(rest[0])
        command = [sys.executable, __file__, str(self.arguments.model), str(self.arguments.calibration)]
        command += [str(self.arguments.test), "--train", str(self.train), "--run", key]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def recovery(self, name: str, seed: int) -> dict[str, Any]:
        """One recovery cell, in this process."""
        row = RECOVERIES[name]
        sparsity = row.sparsity
        if sparsity is None:
            sparsity = equal_density(self.setting.model, 0.7, row.options["rank"])
        setting = row.setting_of(RECOVERY, calibration=str(self.arguments.calibration), train=str(self.train))
        return recovery_cell(
            self.setting.model,
            setting,
            row.method,
            row.options,
            row.pruner,
            f"{sparsity:.6f}",
            seed,
            self.setting.perplexity,
        )

    def cost(self, method: str) -> dict[str, Any]:
        """Time and memory of the tools on this model."""
        from pruning_speed import compare

        if self.arguments.peer_python is None:
            raise SystemExit("cost: name a Python with llm-compressor, --peer-python ENV/bin/python")
        return compare(
            self.setting.model,
            method,
            peer_python=self.arguments.peer_python,
            samples=COST["samples"],
            length=COST["length"],
            rounds=COST["rounds"],
        )


def equal_density(folder: Path, sparsity: float, rank: int) -> float:
    """The sparsity of S at which its nonzeros and the factors together are ``1 - sparsity`` of the weights."""
    from sparsedeploy.allocation.allocate import model_layers
    from sparsedeploy.models.layers import StreamedLayers

    source = StreamedLayers(folder, device=torch.device("cpu"), dtype=torch.float32)
    modules = [module for layer in model_layers(source) for module in layer]
    factors = sum(min(rank, module.rows, module.columns) * (module.rows + module.columns) for module in modules)
    return sparsity + factors / sum(module.size for module in modules)


def summary(cell: dict[str, Any]) -> str:
    return ", ".join(f"{key} {cell[key]}" for key in ("perplexity", "tasks", "seconds") if key in cell)


def markdown(content: dict[str, Any]) -> str:
    """All tables of what has been measured so far."""
    cells = content["cells"]
    calibration, test = content["calibration"], content["test"]
    dense = cells.get("dense", {}).get("perplexity")
    lines = [
        "# A real model",
        "",
        f"{content['model']['name']}, calibrated on {calibration['sequences']} sequences of {calibration['length']} "
        f"tokens of {calibration['data']}; perplexity on the first {test['bytes']:,} bytes of {test['data']} in "
        f"windows of {test['context']}" + (f"; dense {dense:.2f}." if dense else "."),
        "",
    ]
    lines += method_table(cells)
    for level in sorted(LEVELS):
        lines += allocation_table(cells, level)
    lines += samples_table(cells, calibration["length"])
    return "\n".join(lines + recovery_table(cells, content["recovery"]) + task_table(cells) + cost_table(cells))


def method_table(cells: dict[str, Any]) -> list[str]:
    """Methods by levels at uniform rates, the lowest of each level in bold."""
    found = {
        (method, level): values
        for level in LEVELS
        for method in METHODS
        if (values := perplexities(cells, method, "uniform", level))
    }
    if not found:
        return []
    levels = sorted({level for _, level in found})
    best = {level: lowest([values for (_, at), values in found.items() if at == level]) for level in levels}
    lines = ["## Methods at uniform rates", "", f"| method | {' | '.join(map(name_of, levels))} |"]
    lines.append("|---|" + "---:|" * len(levels))
    for method in METHODS:
        texts = [text_of(found.get((method, level), []), best[level]) for level in levels]
        if any(texts):
            lines.append(f"| {method} | {' | '.join(texts)} |")
    return [*lines, ""]


def perplexities(cells: dict[str, Any], method: str, allocation: str, level: str) -> list[float]:
    """Of every seed that was measured; infinite where the model has diverged."""
    start = f"allocation|{method}|{allocation}|{level}|"
    return [
        math.inf if cell["perplexity"] is None else cell["perplexity"]
        for key, cell in cells.items()
        if key.startswith(start)
    ]


def allocation_table(cells: dict[str, Any], level: str) -> list[str]:
    """Allocations by methods; the lowest of each method in bold, and of uniform the range over the seeds."""
    found = {
        (method, allocation): values
        for allocation in ALLOCATIONS
        for method in METHODS
        if (values := perplexities(cells, method, allocation, level))
    }
    if not any(allocation != "uniform" for _, allocation in found):
        return []
    methods = [method for method in METHODS if any(key[0] == method for key in found)]
    best = {method: lowest([values for (of, _), values in found.items() if of == method]) for method in methods}
    lines = [f"## {name_of(level)}", "", f"| allocation | {' | '.join(methods)} |", "|---|" + "---:|" * len(methods)]
    for allocation in ALLOCATIONS:
        texts = [text_of(found.get((method, allocation), []), best[method]) for method in methods]
        if any(text != "" for text in texts):
            lines.append(f"| {allocation} | {' | '.join(texts)} |")
    return [*lines, ""]


def lowest(cells: list[list[float]]) -> float:
    """The lowest mean; no bound where there is nothing to compare."""
    return min(map(statistics.mean, cells)) if len(cells) > 1 else -math.inf


def text_of(values: list[float], best: float) -> str:
    """Mean and half the range; bold where no other is lower."""
    if not values:
        return ""
    mean = statistics.mean(values)
    if not math.isfinite(mean):
        return "diverged"
    text = number(mean) + (f" ± {number((max(values) - min(values)) / 2)}" if len(values) > 1 else "")
    return f"**{text}**" if mean <= best else text


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def name_of(level: str) -> str:
    return f"{float(level):.0%}" if level.startswith("0.") else level.replace("-", " ")


def samples_table(cells: dict[str, Any], length: int) -> list[str]:
    """Methods by numbers of calibration sequences; the 8 of the other tables with the same first seed."""
    found = {tuple(key.split("|")[1:]): cell for key, cell in cells.items() if key.startswith("samples|")}
    if not found:
        return []
    found |= {(method, "8"): cells[f"allocation|{method}|uniform|0.7|0"] for method in METHODS[1:]}
    counts = sorted({int(count) for _, count in found})
    lines = [
        "## Calibration sequences, 70%",
        "",
        f"Sequences of {length} tokens, uniform rates; CPU seconds of the pruning.",
        "",
        f"| method | {' | '.join(map(str, counts))} |",
        "|---|" + "---:|" * len(counts),
    ]
    for method in METHODS[1:]:
        row = [found.get((method, str(count))) for count in counts]
        texts = [f"{text_of([cell['perplexity']], -1)}, {cell['prune_cpu_s']:.0f} s" if cell else "" for cell in row]
        lines.append(f"| {method} | {' | '.join(texts)} |")
    return [*lines, ""]


def recovery_table(cells: dict[str, Any], setting: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in RECOVERIES.items():
        found = [cell for key, cell in cells.items() if key.split("|")[:2] == ["recovery", name]]
        if not found:
            continue
        values = [math.inf if cell["perplexity"] is None else cell["perplexity"] for cell in found]
        density = statistics.mean(cell.get("effective_density", 1 - cell["sparsity"]) for cell in found)
        seconds, peak = (statistics.mean(cell[key] for cell in found) for key in ("cpu_seconds", "peak_mib"))
        tokens, training = found[0].get("tokens"), found[0].get("training", {})
        steps = round(tokens / (setting["length"] * training["batch_size"])) if tokens else ""
        half = " (bfloat16)" if training.get("precision") == "bfloat16" else ""
        rows.append(
            f"| {row.label} | {text_of(values, -1)} | {density:.1%} | {f'{tokens:,}' if tokens else ''} | {steps} "
            f"| {training.get('learning_rate', '')} | {seconds:.0f} s{half} | {peak:.0f} |"
        )
    if not rows:
        return []
    return [
        "## Recovery",
        "",
        f"At 70 % where no other rate is named. Trained on pieces of {setting['length']} tokens of "
        f"{setting['train']}; mean over the seeds and half the "
        "range. Density: nonzero weights, with SparseLo's factors, over the dense weights; LoRA's factors, which also "
        "stay beside the weights, are not counted. Multiplied in float32, or in bfloat16 where it says so.",
        "",
        "| | perplexity | density | training tokens | steps | learning rate | CPU time | peak MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *rows,
        "",
    ]


def task_table(cells: dict[str, Any]) -> list[str]:
    found = {tuple(key.split("|")[1:]): cell["tasks"] for key, cell in cells.items() if key.startswith("tasks|")}
    if not found:
        return []
    lines = ["## Accuracy without examples", "", f"| | {' | '.join(TASKS)} |", "|---|" + "---:|" * len(TASKS)]
    for (method, level), scores in found.items():
        label = method if level == "0" else f"{method}, {name_of(level)}"
        texts = [f"{scores[task]['acc']:.3f} ± {scores[task]['acc_stderr']:.3f}" for task in TASKS]
        lines.append(f"| {label} | {' | '.join(texts)} |")
    return [*lines, ""]


def cost_table(cells: dict[str, Any]) -> list[str]:
    found = {key.split("|")[1]: cell for key, cell in cells.items() if key.startswith("cost|")}
    if not found:
        return []
    from pruning_speed import TOOLS, figures

    lines = [
        "## Time and memory of pruning to 60 %",
        "",
        "Loading and saving included. Peak memory is the process's, libraries included.",
        "",
        f"| method | {' | '.join(TOOLS)} | peak GB: {', '.join(TOOLS)} | same masks |",
        "|---|" + "---:|" * (len(TOOLS) + 2),
    ]
    for method, cell in found.items():
        seconds, peaks = figures(cell)
        times = " | ".join(f"{seconds[tool]:.1f} s" for tool in TOOLS)
        memory = ", ".join(f"{peaks[tool]:.2f}" for tool in TOOLS)
        lines.append(f"| {method} | {times} | {memory} | {cell['mask_agreement']:.2%} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--train", type=Path, help="Text to train on [default: the calibration text].")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["allocation", "samples", "recovery", "tasks"],
        choices=["allocation", "samples", "recovery", "tasks", "cost"],
    )
    parser.add_argument("--cells", nargs="*", help="Only cells whose key starts with one of these.")
    parser.add_argument("--shard", default="1/1", help="I/N: every N-th cell, from the I-th.")
    parser.add_argument("--limit-minutes", type=float, default=math.inf, help="Start no cell after so long.")
    parser.add_argument("--list", action="store_true", help="Print the keys of what is missing.")
    parser.add_argument("--peer-python", help="Python of an environment with llm-compressor, for the cost.")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    progress.show(False)
    bench = Bench(arguments)
    if arguments.run:
        _, name, seed = arguments.run.split("|")
        print(json.dumps(bench.recovery(name, int(seed))))
        return
    shard, shards = (int(number) for number in arguments.shard.split("/"))
    cells = [key for key in all_cells(arguments.parts) if bench.store.missing(key)]
    if arguments.cells:
        cells = [key for key in cells if any(key.startswith(wanted) for wanted in arguments.cells)]
    cells = (["dense"] if bench.store.missing("dense") else []) + cells
    if arguments.list:
        print("\n".join(cells))
        return
    began = time.monotonic()
    for key in cells[shard - 1 :: shards]:
        if time.monotonic() - began > 60 * arguments.limit_minutes:
            break
        bench.run(key)


if __name__ == "__main__":
    main()
