"""Every export target on the reference model, dense and pruned, in one table.

Exports the reference model and its 70 % SparseGPT pruning to every target whose runtime is installed, and reports for
each: size on disk, load time, the largest difference of its log-probabilities from torch's in float32, how many of 32
greedy tokens are torch's, perplexity on held-out text, and tokens/s of prefill (128 tokens) and decode. A second table
lists the installed runtimes: what they take on disk and how long their installation took.

    python benchmarks/targets.py [--work FOLDER] [--cores 1] [--rounds 10]

Writes ``benchmarks/results/targets.json`` and ``targets.md``. The rows do not take turns: compare speeds with
``sparsedeploy bench``, which does, before you conclude anything from small differences.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsedeploy import progress
from sparsedeploy.artifacts.folder import describe_folder
from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json, write_text
from sparsedeploy.machine import this_machine
from sparsedeploy.models.loading import load_model
from sparsedeploy.models.tokenizer import load_tokenizer
from sparsedeploy.quality.perplexity import windows_of
from sparsedeploy.reference import reference_model, stdlib_documents
from sparsedeploy.runtimes.engine import open_model
from sparsedeploy.runtimes.environments import list_runtimes, require
from sparsedeploy.targets.registry import export_checkpoint
from sparsedeploy.workflows.options import PruneOptions
from sparsedeploy.workflows.prune import prune as prune_checkpoint

RESULTS = Path(__file__).resolve().parent / "results"
PROMPT, NEW_TOKENS, WINDOWS = 128, 32, 8
INT8 = {"int8": True, "data": "stdlib", "windows": 0}
# Name in the table -> export target (None: the checkpoint itself), its options, runtime.
CASES: dict[str, tuple[str | None, dict[str, Any], str]] = {
    "checkpoint on torch": (None, {}, "torch"),
    "onnxruntime": ("onnxruntime", {}, "onnxruntime"),
    "deepsparse": ("deepsparse", {}, "deepsparse"),
    "deepsparse int8": ("deepsparse", INT8, "deepsparse"),
    "checkpoint on vllm": (None, {}, "vllm"),
    "vllm": ("vllm", {}, "vllm"),
}
COLUMNS = (
    ("model", "{}"),
    ("target", "{}"),
    ("sparsity", "{:.0%}"),
    ("size, MB", "{:.1f}"),
    ("load, s", "{:.2f}"),
    ("log-prob. error", "{:.1e}"),
    ("greedy tokens equal", "{}/32"),
    ("perplexity", "{:.2f}"),
    ("prefill, tokens/s", "{:.0f}"),
    ("decode, tokens/s", "{:.0f}"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the models [default: a temporary one]")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run(arguments.work or Path(scratch), arguments.cores, arguments.rounds)


def run(work: Path, cores: int, rounds: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    machine = this_machine()
    result: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "processor": machine.processor,
        "cores": cores,
        "load_average": os.getloadavg()[0],
        "prompt_tokens": PROMPT,
        "rounds": rounds,
        "runtimes": [
            {**status.to_json(), "path": None, "install_seconds": install_seconds(status.path)}
            for status in list_runtimes()
            if status.state == "installed"
        ],
        "rows": [],
        "left_out": {},
    }
    dense = reference_model("default")
    models = {"dense": dense, "sparsegpt-70": prune(dense, work / "sparsegpt-70")}
    tokens = load_tokenizer(dense)("\n\n".join(stdlib_documents("test")), verbose=False)["input_ids"]
    windows = windows_of(tokens, PROMPT, "stdlib")[:: len(tokens) // PROMPT // WINDOWS][:WINDOWS]
    for name, checkpoint in models.items():
        expected = in_torch(checkpoint, windows)
        for case, (target, options, runtime) in CASES.items():
            try:
                require(runtime)
                folder = checkpoint if target is None else work / f"{name}-{case.replace(' ', '-')}"
                if target is not None:
                    export_checkpoint(checkpoint, target, folder, options, overwrite=True)
                row = measure(folder, runtime, windows, expected, cores, rounds)
                result["rows"].append({"model": name, "target": case, **row})
            except UserError as error:
                result["left_out"][f"{name}, {case}"] = str(error).replace(str(checkpoint), name)
                progress.note(f"{name}, {case}: {error}")
            write_json(RESULTS / "targets.json", result)
            write_text(RESULTS / "targets.md", markdown(result))


def prune(dense: Path, folder: Path) -> Path:
    if not folder.is_dir():
        calibration = CalibrationOptions("stdlib", sequences=32)
        options = PruneOptions(sparsity=0.7, method="sparsegpt", calibration=calibration)
        prune_checkpoint(str(dense), folder, options)
    return folder


def install_seconds(path: str) -> float | None:
    """What the installation took, by the times of the first and the last file that it wrote; None without them."""
    first, last = Path(path) / "env" / "pyvenv.cfg", Path(path) / "complete.json"
    if not (first.is_file() and last.is_file()):
        return None
    return last.stat().st_mtime - first.stat().st_mtime


@torch.no_grad()
def in_torch(checkpoint: Path, windows: torch.Tensor) -> dict[str, Any]:
    """Log-probabilities [N, T, V] of the windows, and 32 greedy tokens after the first, in float32."""
    model: Any = load_model(checkpoint, dtype=torch.float32)
    scores = torch.cat([model(window[None], use_cache=False).logits for window in windows])
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "eos_token_id": None}
    greedy = model.generate(windows[:1], **settings)[0, PROMPT:].tolist()
    return {"scores": torch.log_softmax(scores, dim=-1), "greedy": greedy}


def measure(
    folder: Path, runtime: str, windows: torch.Tensor, expected: dict[str, Any], cores: int, rounds: int
) -> dict[str, Any]:
    """One row: quality and speed of a folder on a runtime."""
    sizes: dict[str, Any] = {
        "prompt_length": PROMPT,
        "new_tokens": NEW_TOKENS,
        "runtime": runtime,
        "cores": cores,
        "chunk": 64,
    }
    prompt = windows[0].tolist()
    started = time.perf_counter()
    with open_model(folder, **sizes) as model:
        load_seconds = time.perf_counter() - started
        timings = [model.measure(prompt, NEW_TOKENS - 1) for _ in range(rounds + 2)][2:]
        greedy = list(model.generate(prompt, NEW_TOKENS, 0.0, 0, []))
        found = torch.stack([torch.from_numpy(model.logits(window.tolist(), [])[0]) for window in windows])
        facts = model.facts
    scores = torch.log_softmax(found.float(), dim=-1)
    loss = torch.nn.functional.nll_loss(scores[:, :-1].transpose(1, 2), windows[:, 1:])
    artifact = describe_folder(folder)
    prefill = statistics.median(timing.prefill_seconds for timing in timings)
    decode = statistics.median(value for timing in timings for value in timing.decode_seconds)
    # Unlikely tokens are left out: their logarithms are large and their errors mean nothing.
    likely = expected["scores"] > np.log(1e-6)
    same = [ours == theirs for ours, theirs in zip(greedy, expected["greedy"], strict=True)]
    return {
        "sparsity": artifact.sparsity.fraction,
        "size, MB": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6,
        "load, s": load_seconds,
        "log-prob. error": float((scores - expected["scores"]).abs()[likely].max()),
        "greedy tokens equal": same.index(False) if False in same else len(same),
        "perplexity": float(loss.exp()),
        "prefill, tokens/s": PROMPT / prefill,
        "decode, tokens/s": 1 / decode,
        "facts": facts,
    }


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# Targets",
        "",
        f"Reference model (5.5 M weights), {result['cores']} core of {result['processor']}, prompt of {PROMPT} tokens, "
        f"medians of {result['rounds']} rounds; load average at the start {result['load_average']:.1f}. Load is from "
        "nothing to a model that answers, the start of the engine's process included. The error is the largest "
        "difference from torch among tokens of probability above 1e-6; greedy tokens are counted up to the first that "
        "differs.",
        "",
        table(
            [header for header, _ in COLUMNS],
            [[form.format(row[key]) for key, form in COLUMNS] for row in result["rows"]],
        ),
    ]
    if result["left_out"]:
        lines += ["", "Left out:", "", *(f"- {case}: {why}" for case, why in result["left_out"].items())]
    rows = []
    for status in result["runtimes"]:
        seconds = status["install_seconds"]
        versions = ", ".join(f"{name} {version}" for name, version in status["versions"].items())
        size = f"{status['bytes'] / 1e6:.0f}" if status["bytes"] else "none of its own"
        rows.append([status["name"], versions, size, "" if seconds is None else f"{seconds:.0f}"])
    lines += ["", "## Runtimes", "", table(["runtime", "versions", "on disk, MB", "install, s"], rows), ""]
    return "\n".join(lines)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headers, ["---"] * len(headers), *rows))


if __name__ == "__main__":
    main()
