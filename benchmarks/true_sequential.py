"""Perplexity of the reference model with the linears of a layer pruned together, and in turn (``--true-sequential``).

    python benchmarks/true_sequential.py [--preset default] [--seeds 3]

Writes benchmarks/results/true_sequential.json and .md; finished cells are kept, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.allocation import ALLOCATORS
from sparsedeploy.calibration.documents import load_documents
from sparsedeploy.calibration.samples import sample_tokens
from sparsedeploy.evaluation.perplexity import perplexity, text_windows
from sparsedeploy.folders import write_json, write_text
from sparsedeploy.models.loading import load_model, load_tokenizer
from sparsedeploy.pipeline import make_plan, prune_model, resolve_pattern
from sparsedeploy.pruning import PRUNERS
from sparsedeploy.reference import reference_model

DATA = "stdlib"
# As in allocation_quality.py.
SETTINGS = {"sequences": 16, "length": 256, "context": 256, "windows": 32}
RESULTS = Path(__file__).resolve().parent / "results"
TARGETS = ("0.5", "0.6", "0.7", "0.8", "2:4")
METHODS = ("wanda", "sparsegpt")
ORDERS = ("together", "in turn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="default", help="of the reference model")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    progress.show()
    folder = reference_model(arguments.preset)
    dense, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    windows = text_windows(DATA, tokenizer, SETTINGS["context"], split="test")
    windows = windows[:: max(1, len(windows) // SETTINGS["windows"])][: SETTINGS["windows"]]
    path = RESULTS / "true_sequential.json"
    results: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    documents = load_documents(DATA, split="train")
    for seed in range(arguments.seeds):
        calibration = sample_tokens(
            documents, tokenizer, sequences=SETTINGS["sequences"], length=SETTINGS["length"], seed=seed, data=DATA
        )
        for target in TARGETS:
            is_pattern = ":" in target
            sparsity, pattern = resolve_pattern(
                None if is_pattern else float(target), target if is_pattern else "unstructured"
            )
            plan = make_plan(dense, None, sparsity, pattern, "uniform", ALLOCATORS.get("uniform").make_options())
            for method in METHODS:
                for order in ORDERS:
                    key = cell(method, target, order, seed)
                    if key not in results:
                        progress.note(key)
                        candidate: nn.Module = copy.deepcopy(dense)
                        options = PRUNERS.get(method).make_options()
                        in_turn = order == "in turn"
                        prune_model(candidate, calibration, plan, method, options, true_sequential=in_turn)
                        results[key] = perplexity(candidate, windows, batch_size=8).perplexity
                        write_json(path, results)
    write_text(RESULTS / "true_sequential.md", markdown(results, arguments.seeds))
    print(markdown(results, arguments.seeds))


def cell(method: str, target: str, order: str, seed: int) -> str:
    return f"{method} | {target} | {order} | {seed}"


def markdown(results: dict[str, Any], seeds: int) -> str:
    lines = [
        "# The linears of a layer pruned together and in turn",
        "",
        f"Perplexity on held-out text, mean and standard deviation over {seeds} calibration seeds, uniform rates.",
        "",
        "| method | order | " + " | ".join(TARGETS) + " |",
        "|---|---|" + "---:|" * len(TARGETS),
    ]
    for method in METHODS:
        for order in ORDERS:
            cells = []
            for target in TARGETS:
                values = [results[cell(method, target, order, seed)] for seed in range(seeds)]
                spread = f" ± {statistics.stdev(values):.2f}" if seeds > 1 else ""
                cells.append(f"{statistics.mean(values):.2f}{spread}")
            lines.append(f"| {method} | {order} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
