"""What each allocation costs: time and peak memory as ratios to one calibration forward pass.

    python benchmarks/allocation.py [--only reference|wide] [-o benchmarks/results]

The baseline runs the calibration text once through the decoder layers, one after the other, and measures nothing.
Each method runs in a process of its own, next to its own baseline; one thread, processor seconds (so that other work
on the machine does not count), the least of the repeats. Memory is the peak of the process's resident set while the
method runs, against the peak of the baseline.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsedeploy.allocation import measure_layers, model_layers
from sparsedeploy.allocation.mixed import layer_step_costs
from sparsedeploy.calibration.driver import LayerContext
from sparsedeploy.folders import write_json, write_text
from sparsedeploy.registry import ALLOCATORS

REPEATS = 2
PUBLISHED_TOKENS = 128 * 2048
CASES: dict[str, tuple[str, dict[str, str]]] = {
    "owl": ("owl", {}),
    "dlp median": ("dlp", {}),
    "dlp mean": ("dlp", {"reduce": "mean"}),
    "alphapruning": ("alphapruning", {}),
    "lsa": ("lsa", {}),
    "rmi": ("rmi", {}),
    "mixed N:8, marginal costs": ("", {}),
}
SETUPS: dict[str, dict[str, int]] = {
    "reference": {"sequences": 32, "length": 128},
    "wide": {"sequences": 16, "length": 64},
}


def load(setup: str) -> nn.Module:
    """The trained reference model, or a random Llama of hidden size 2048 with 4 layers, in float32."""
    if setup == "reference":
        from sparsedeploy.models.loading import load_model
        from sparsedeploy.reference import reference_model

        return load_model(reference_model(), device=torch.device("cpu"), dtype=torch.float32)
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=2048,
        max_position_embeddings=2048,
    )
    return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()


def measure(setup: str, case: str) -> dict[str, Any]:
    """Time one method and its baseline, in this process."""
    torch.set_num_threads(1)
    model: Any = load(setup)
    shape = SETUPS[setup]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (shape["sequences"], shape["length"]), generator=generator)

    def nothing(layer: LayerContext) -> None:
        return None

    def run(needs: Any, reduce: Callable[[LayerContext], Any]) -> tuple[float, float, int]:
        """Processor seconds in all, those of the method's own work, and the peak of the resident set in bytes."""
        own = 0.0

        def timed(layer: LayerContext) -> None:
            nonlocal own
            before = time.process_time()
            reduce(layer)
            own += time.process_time() - before

        reset_peak()
        start = time.process_time()
        measure_layers(model, tokens, needs, timed, name=case)
        return time.process_time() - start, own, peak_bytes()

    name, values = CASES[case]
    if name:
        method = ALLOCATORS.get(name)
        allocator = method.function(method.make_options(values))
        needs, reduce = method.traits["needs"], allocator.measure
    else:
        needs, reduce = "sum_squares", lambda layer: layer_step_costs(layer, 8)
    run("inputs", nothing)  # warms up
    forward = [run("inputs", nothing) for _ in range(REPEATS)]
    scored = [run(needs, reduce) for _ in range(REPEATS)]
    forward_seconds = min(seconds for seconds, _, _ in forward)
    seconds, own, _ = min(scored)
    # What does not grow with the text is the method's own work, except where that reads the hidden states.
    grows, fixed = (seconds, 0.0) if needs == "inputs" else (seconds - own, own)
    scale = PUBLISHED_TOKENS / tokens.numel()
    peak_forward, peak = (max(p for _, _, p in runs) for runs in (forward, scored))
    return {
        "setup": setup,
        "method": case,
        "parameters": sum(m.size for layer in model_layers(model) for m in layer),
        "tokens": tokens.numel(),
        "forward_seconds": forward_seconds,
        "seconds": seconds,
        "own_seconds": own,
        "time_ratio": seconds / forward_seconds,
        "time_ratio_at_published_tokens": (grows * scale + fixed) / (forward_seconds * scale),
        "forward_peak_mb": peak_forward / 1e6,
        "peak_mb": peak / 1e6,
        "memory_ratio": peak / peak_forward,
    }


def reset_peak() -> None:
    """Start the kernel's peak counter of this process anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def markdown(results: list[dict[str, Any]]) -> str:
    lines = [
        "# What each allocation costs",
        "",
        "Ratios to one forward pass of the calibration text through the decoder layers. One thread, processor",
        f"seconds, the least of {REPEATS}; memory is the peak resident set of the process. uniform and atp measure",
        "nothing; atp's search costs one pruning and one evaluation per trial. The last column is derived, not",
        f"measured: what grows with the text is scaled to the papers' {PUBLISHED_TOKENS:,} tokens, the rest is kept.",
        "",
    ]
    for setup in dict.fromkeys(result["setup"] for result in results):
        rows = [result for result in results if result["setup"] == setup]
        first = rows[0]
        lines += [
            f"## {setup}: {first['parameters'] / 1e6:.1f} M prunable weights, {first['tokens']:,} tokens, "
            f"forward {min(row['forward_seconds'] for row in rows):.2f} s, peak {first['forward_peak_mb']:.0f} MB",
            "",
            "| method | time | own work | memory | time at 262,144 tokens |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['method']} | {row['time_ratio']:.2f}x | {row['own_seconds']:.2f} s | {row['memory_ratio']:.2f}x "
            f"| {row['time_ratio_at_published_tokens']:.2f}x |"
            for row in rows
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=list(SETUPS))
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--one", nargs=2, metavar=("SETUP", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    path = arguments.output / "allocation.json"
    stored = json.loads(path.read_text())["results"] if path.exists() else []
    done: dict[tuple[str, str], dict[str, Any]] = {(row["setup"], row["method"]): row for row in stored}
    for setup in [arguments.only] if arguments.only else list(SETUPS):
        for case in CASES:
            command = [sys.executable, __file__, "--one", setup, case]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = done[setup, case] = json.loads(output.splitlines()[-1])
            print(
                f"{setup:10} {case:28} time {row['time_ratio']:6.2f}x  memory {row['memory_ratio']:5.2f}x", flush=True
            )
    results = [done[setup, case] for setup in SETUPS for case in CASES if (setup, case) in done]
    machine = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    write_json(path, {"machine": machine, "results": results})
    write_text(path.with_suffix(".md"), markdown(results))


if __name__ == "__main__":
    main()
