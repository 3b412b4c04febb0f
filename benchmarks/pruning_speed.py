"""Time and memory of pruning against llm-compressor and against a straightforward two-forward loop, side by side.

    python benchmarks/pruning_speed.py --peer-python ENV/bin/python [--sizes 100M 1B] [--layers 4 8 16] [--rounds 3]

Run it in a plain installation, without the development extra: its libraries are imported too, and count as memory.
All three prune the same random Llama on the same calibration tokens to the same rates; rounds are interleaved, each in
a process of its own. llm-compressor replays the recipe of our checkpoint, and the masks are compared. Writes
benchmarks/results/pruning_speed.json and .md; a finished case is kept, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparsedeploy import progress
from sparsedeploy.checkpoint.manifest import load_manifest
from sparsedeploy.folders import write_json, write_text
from sparsedeploy.models.tokenizer import load_tokenizer
from sparsedeploy.reference import reference_model

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SHAPES = {
    "100M": {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
}
SPARSITY = 0.6
TOOLS = ("sparsedeploy", "two-forward loop", "llm-compressor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="Python of an environment with llmcompressor 0.14")
    parser.add_argument("--sizes", nargs="+", default=["100M", "1B"], choices=list(SHAPES))
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    progress.show()
    path = RESULTS / "pruning_speed.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    for size in arguments.sizes:
        for layers in arguments.layers:
            for method in arguments.methods:
                key = f"{size} {layers} layers {method}"
                if key not in results:
                    progress.note(key)
                    results[key] = case(size, layers, method, arguments)
                    write_json(path, results)
                    write_text(RESULTS / "pruning_speed.md", markdown(results))
    print(markdown(results))


def case(size: str, layers: int, method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All tools on one random model."""
    with tempfile.TemporaryDirectory(prefix="pruning-speed-") as name:
        model = random_llama(Path(name) / "model", size, layers)
        return compare(
            model,
            method,
            peer_python=arguments.peer_python,
            samples=arguments.samples,
            length=arguments.length,
            rounds=arguments.rounds,
        )


def compare(model: Path, method: str, *, peer_python: str, samples: int, length: int, rounds: int) -> dict[str, Any]:
    """All tools on a model folder, in turn, ``rounds`` times, on the same random tokens."""
    with tempfile.TemporaryDirectory(prefix="pruning-speed-") as name:
        place = Path(name)
        generator = np.random.default_rng(0)
        np.save(place / "tokens.npy", generator.integers(0, 4096, (samples, length)))
        runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in TOOLS}
        agreement = 0.0
        for _ in range(rounds):
            ours = [sys.executable, str(HERE / "peers" / "ours.py"), str(model), method, str(SPARSITY)]
            runs[TOOLS[0]].append(run([*ours, str(place / "tokens.npy"), str(place / "ours")]))
            loop = [sys.executable, str(HERE / "peers" / "two_forward_loop.py"), str(model), method, str(SPARSITY)]
            runs[TOOLS[1]].append(run([*loop, str(place / "tokens.npy"), str(place / "loop")]))
            recipe = str(place / "ours" / "recipe.yaml")
            peer = [peer_python, str(HERE / "peers" / "oneshot.py"), str(model), recipe]
            runs[TOOLS[2]].append(run([*peer, str(place / "tokens.npy"), str(place / "peer")]))
            agreement = mask_agreement(place / "ours", place / "peer")
            for folder in ("ours", "loop", "peer"):
                shutil.rmtree(place / folder)
        return {
            "weights": sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values()),
            "samples": samples,
            "length": length,
            "mask_agreement": agreement,
            "runs": runs,
        }


def figures(result: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds and peak gigabytes by tool, medians over the rounds."""
    seconds = {tool: median(result, tool, lambda run: sum(run["seconds"].values())) for tool in TOOLS}
    return seconds, {tool: median(result, tool, lambda run: run["peak_bytes"]) / 1e9 for tool in TOOLS}


def random_llama(folder: Path, size: str, layers: int) -> Path:
    """A random bfloat16 Llama; llm-compressor insists on a tokenizer, though it is given tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[size], num_hidden_layers=layers, vocab_size=4096, max_position_embeddings=512, dtype="bfloat16"
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20GB")
    load_tokenizer(reference_model("tiny")).save_pretrained(folder)
    return folder


def run(command: list[str]) -> dict[str, Any]:
    """Run one tool; its last line is a JSON report."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def mask_agreement(ours: Path, peer: Path) -> float:
    """Share of prunable weights that both prune or both keep."""
    names = [entry.tensor for entry in load_manifest(ours).modules.values()]
    left, right = load_file(ours / "model.safetensors"), load_file(peer / "model.safetensors")
    same = sum(int(((left[name] == 0) == (right[name] == 0)).sum()) for name in names)
    return same / sum(left[name].numel() for name in names)


def markdown(results: dict[str, Any]) -> str:
    results = dict(sorted(results.items(), key=place_of))
    lines = [
        "# Speed and memory of pruning",
        "",
        "Medians of interleaved rounds; times are ratios to sparsedeploy's, loading and saving included, start-up of "
        "Python not. Peak memory is the process's resident set, with the imported libraries, each tool in a plain "
        f"installation of its own; the imports alone take {imports_of(results)}.",
        "",
        "| case | weights | rounds | sparsedeploy | two-forward loop | llm-compressor "
        "| peak GB: ours, loop, llm-compressor | mask agreement |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for key, result in results.items():
        seconds, peaks = figures(result)
        base, rounds = seconds[TOOLS[0]], len(result["runs"][TOOLS[0]])
        lines.append(
            f"| {key} | {result['weights'] / 1e6:.0f} M | {rounds} | {base:.1f} s "
            f"| {' | '.join(f'{seconds[tool] / base:.2f}x' for tool in TOOLS[1:])} "
            f"| {', '.join(f'{peaks[tool]:.2f}' for tool in TOOLS)} "
            f"| {result['mask_agreement']:.4%} |"
        )
    lines += ["", "Where sparsedeploy's time goes:", "", "| case | " + " | ".join(split_names(results)) + " |"]
    lines.append("|---|" + "---:|" * len(split_names(results)))
    for key, result in results.items():
        cells = [median(result, TOOLS[0], lambda run, name=name: run["seconds"][name]) for name in split_names(results)]
        lines.append(f"| {key} | " + " | ".join(f"{value:.2f} s" for value in cells) + " |")
    return "\n".join(lines) + "\n"


def place_of(case: tuple[str, Any]) -> tuple[int, int, str]:
    """By size, depth and method."""
    size, layers, _, method = case[0].split()
    return list(SHAPES).index(size), int(layers), method


def imports_of(results: dict[str, Any]) -> str:
    """Memory of each tool before it begins."""
    first = next(iter(results.values()))
    return ", ".join(f"{median(first, tool, lambda run: run['imports_bytes']) / 1e9:.2f} GB ({tool})" for tool in TOOLS)


def split_names(results: dict[str, Any]) -> list[str]:
    return list(next(iter(results.values()))["runs"][TOOLS[0]][0]["seconds"])


def median(result: dict[str, Any], tool: str, figure: Any) -> float:
    return float(statistics.median(figure(run) for run in result["runs"][tool]))


if __name__ == "__main__":
    main()
