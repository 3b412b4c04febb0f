"""Recovery on the reference model: perplexity, time and memory of LoSA, its ablations and its baselines.

    python benchmarks/recovery.py [--seeds 3] [--levels 0.7 ...] [--methods losa ...] [--fresh]

Every method trains for 200 optimizer steps of 512 tokens. Writes benchmarks/results/recovery.json and .md.

Every cell (method, level, seed) runs in a process of its own, on one thread, and is stored when it ends; run the
script again to go on where it stopped. All trained methods see the same number of tokens, of texts that the seed
chooses from the training split; the seed also chooses the calibration text and the adapters. Perplexity is of the test
split. Peak memory is the process's largest resident size, less what it was before the model was loaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from cells import ALL_WEIGHTS, RECOVERIES_COMPARED, Recovery

from sparsedeploy import progress

LEVELS = ("0.5", "0.6", "0.7", "0.9", "mixed-2:8")
# One-shot and fixed-mask methods prune 2:8 where LoSA mixes it.
ROWS = {
    "wanda": Recovery("Wanda, one-shot", None, "wanda"),
    "sparsegpt": Recovery("SparseGPT, one-shot", None, "sparsegpt"),
    "alps": Recovery("ALPS, one-shot", None, "alps"),
    **RECOVERIES_COMPARED,
}
DENSE = Recovery("dense", None, None)
SETTINGS: dict[str, Any] = {
    "sequences": 16,
    "length": 256,
    "windows": 96,
    "train_sequences": 400,
    "dropout": 0.0,
    "training": {
        "learning_rate": 5e-3,
        "warmup_ratio": 0.1,
        "weight_decay": 0.0,
        "clip": 1.0,
        "batch_size": 2,
        "accumulation": 1,
    },
}


def run_cell(method: str, level: str, seed: int, folder: Path) -> dict[str, Any]:
    """One cell, in this process: prune, recover, measure."""
    import torch

    torch.set_num_threads(1)
    from cells import recovery_cell

    from sparsedeploy.models.tokenizer import load_tokenizer
    from sparsedeploy.quality.perplexity import perplexity, text_windows

    row = DENSE if method == "dense" else ROWS[method]
    values = {key: value for key, value in SETTINGS.items() if key != "windows"}
    setting = row.setting_of(values, calibration="stdlib", train="stdlib")
    windows = text_windows("stdlib", load_tokenizer(folder), setting.length)
    windows = windows[:: max(1, len(windows) // SETTINGS["windows"])][: SETTINGS["windows"]]
    cell = recovery_cell(
        folder,
        setting,
        row.method,
        row.options,
        row.pruner,
        level,
        seed,
        lambda model: perplexity(model, windows, batch_size=8).perplexity,
    )
    return {"method": method, **cell}


class Bench:
    """The file of finished cells and the tables made from it."""

    def __init__(self, path: Path, fresh: bool, changed: list[str]) -> None:
        from cells import Store

        from sparsedeploy.models.fingerprint import model_sha256
        from sparsedeploy.reference import reference_model

        self.folder = reference_model()
        self.changed = changed
        header = {
            "settings": SETTINGS,
            "model": {"name": self.folder.name, "sha256": model_sha256(self.folder)},
        }
        self.store = Store(path, header, markdown, fresh=fresh)

    def run(self, cells: list[tuple[str, str, int]]) -> None:
        """Run what is missing, one process per cell."""
        missing = [cell for cell in cells if self.store.missing(_key(*cell))]
        with progress.bar("recovery", len(missing), "cells") as advance:
            for method, level, seed in missing:
                command = [sys.executable, __file__, "--cell", method, level, str(seed), str(self.folder)]
                command += ["--set", *self.changed]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
                self.store.add(_key(method, level, seed), json.loads(done.stdout.splitlines()[-1]))
                advance(1, f"{method} {level} {seed}")


def markdown(content: dict[str, Any]) -> str:
    """The figures as tables: mean over the seeds, and how far the seeds are apart."""
    cells = list(content["cells"].values())
    levels = [level for level in LEVELS if any(cell["level"] == level for cell in cells)]
    trained = next((cell["tokens"] for cell in cells if "tokens" in cell), 0)
    lines = [
        "# Recovery on the reference model",
        "",
        f"The shipped model; test perplexity at {SETTINGS['length']} tokens of context, lower "
        f"is better; {trained:,} training tokens for every trained method, {SETTINGS['training']['batch_size']} "
        f"sequences a step at a learning rate of {SETTINGS['training']['learning_rate']:g}, ELSA at "
        f"{ALL_WEIGHTS['training']['learning_rate']:g}. Mean over seeds ± half the range.",
        "",
        "| | " + " | ".join(_level_name(level) for level in levels) + " |",
        "|---|" + "---|" * len(levels),
    ]
    dense = [cell["perplexity"] for cell in cells if cell["method"] == "dense"]
    if dense:
        lines.append(f"| dense | {' | '.join([f'{dense[0]:.2f}'] * len(levels))} |")
    for method in (method for method in ROWS if any(cell["method"] == method for cell in cells)):
        row = [
            _summary([c["perplexity"] for c in cells if (c["method"], c["level"]) == (method, level)])
            for level in levels
        ]
        lines.append(f"| {ROWS[method].label} | {' | '.join(row)} |")
    lines += [
        "",
        "Time and memory at 70 %, one thread:",
        "",
        "| | CPU seconds | over LoRA | peak MiB | over LoRA |",
    ]
    lines.append("|---|---|---|---|---|")
    base = {key: _mean(cells, "lora", key) for key in ("cpu_seconds", "peak_mib")}
    for method in ("sparse-lora", "lora", "losa", "elsa"):
        seconds, peak = _mean(cells, method, "cpu_seconds"), _mean(cells, method, "peak_mib")
        if seconds and peak and base["cpu_seconds"] and base["peak_mib"]:
            lines.append(
                f"| {ROWS[method].label} | {seconds:.0f} | {seconds / base['cpu_seconds']:.2f} | {peak:.0f} "
                f"| {peak / base['peak_mib']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def _mean(cells: list[dict[str, Any]], method: str, key: str, level: str = "0.7") -> float | None:
    values = [cell[key] for cell in cells if (cell["method"], cell["level"]) == (method, level)]
    return statistics.mean(values) if values else None


def _summary(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _level_name(level: str) -> str:
    return f"{float(level):.0%}" if level[0] == "0" else level.replace("-", " ")


def _key(method: str, level: str, seed: int) -> str:
    return f"{method}/{level}/{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), choices=LEVELS)
    parser.add_argument("--methods", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--fresh", action="store_true", help="Start anew.")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="Change settings, to explore.")
    parser.add_argument("--cell", nargs=4, metavar=("METHOD", "LEVEL", "SEED", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for pair in arguments.set:
        key, _, value = pair.partition("=")
        where = SETTINGS["training"] if key in SETTINGS["training"] else SETTINGS
        where[key] = json.loads(value)
    if arguments.cell:
        method, level, seed, folder = arguments.cell
        print(json.dumps(run_cell(method, level, int(seed), Path(folder))))
        return
    progress.show()
    cells = [("dense", "0", 0)]
    cells += [
        (m, level, seed) for seed in range(arguments.seeds) for level in arguments.levels for m in arguments.methods
    ]
    bench = Bench(arguments.output / "recovery.json", arguments.fresh, arguments.set)
    bench.run(cells)
    print(markdown(bench.store.content))


if __name__ == "__main__":
    main()
