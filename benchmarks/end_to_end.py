"""Whole models that generate text: sparse weights in llama.cpp against llama.cpp's own dense kernels.

    python benchmarks/end_to_end.py ARTIFACT [ARTIFACT ...] [--text FILE] [--rounds 3] [--name end_to_end]

Every folder was exported with ``--target llamacpp``. Each GGUF file runs twice in every round, once with the backend
for sparse weights and once without: the same file, the same llama.cpp, its own program ``llama-bench``, rounds
interleaved. With ``--text``, ``llama-perplexity`` says on the same windows whether both compute the same. Writes
benchmarks/results/NAME.json and .md; a finished round is kept, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

from sparsedeploy.artifacts.description import load_artifact
from sparsedeploy.folders import write_json, write_text
from sparsedeploy.runtimes.environments import require
from sparsedeploy.runtimes.installation import process_environment
from sparsedeploy.runtimes.llamacpp import Build, build_of, offer
from sparsedeploy.runtimes.machine import usable_cores

RESULTS = Path(__file__).resolve().parent / "results"
WAYS = ("dense", "sparse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", type=Path, help="text to take the perplexity on")
    parser.add_argument("--chunks", type=int, default=8, help="windows of 512 tokens of it")
    parser.add_argument("--name", default="end_to_end")
    arguments = parser.parse_args()
    environment = require("llamacpp")
    build = build_of(environment)
    variables = process_environment(environment.runtime)
    path = RESULTS / f"{arguments.name}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"runs": {}, "perplexity": {}}
    results["machine"] = {
        "processor": processor(),
        "threads": arguments.threads,
        "prompt": arguments.prompt,
        "new_tokens": arguments.new_tokens,
    }
    for number in range(arguments.rounds):
        for folder in arguments.artifacts:
            for way in WAYS:
                runs = results["runs"].setdefault(folder.name, {"about": about(folder), "dense": [], "sparse": []})
                if len(runs[way]) > number:
                    continue
                runs[way].append(speed(build, folder, way, variables, arguments))
                write_json(path, results)
    for folder in arguments.artifacts if arguments.text else ():
        for way in WAYS:
            found = results["perplexity"].setdefault(folder.name, {})
            if way not in found:
                found[way] = perplexity(build, folder, way, variables, arguments)
                write_json(path, results)
    write_text(path.with_suffix(".md"), table(results))
    print(table(results))


def about(folder: Path) -> dict[str, Any]:
    artifact = load_artifact(folder)
    size = (folder / "model.gguf").stat().st_size
    return {"type": artifact.dtype, "zeros": artifact.sparsity.fraction, "bytes": size}


def processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if os.name == "posix" else None
    return found[1] if found else platform.processor()


def run(build: Build, program: str, options: list[str], way: str, variables: dict[str, str]) -> tuple[str, str]:
    """Output and messages of one of llama.cpp's programs, with or without the backend."""
    more = {"GGML_BACKEND_PATH": str(build.backend)} if way == "sparse" else {}
    backend = offer() if way == "sparse" and program != "llama-bench" else ()
    command = [str(build.program(program)), *options, *backend]
    done = subprocess.run(command, env={**variables, **more}, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def speed(
    build: Build, folder: Path, way: str, variables: dict[str, str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Tokens a second, of the prompt and of the new tokens, and what the backend packed."""
    sizes = ["-p", str(arguments.prompt), "-n", str(arguments.new_tokens), "-t", str(arguments.threads), "-r", "1"]
    output, _ = run(build, "llama-bench", ["-m", str(folder / "model.gguf"), *sizes, "-o", "json"], way, variables)
    prefill, decode = (entry["avg_ts"] for entry in json.loads(output))
    return {"prefill": prefill, "decode": decode}


def perplexity(
    build: Build, folder: Path, way: str, variables: dict[str, str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Of a text in windows of 512 tokens, and the memory of the packed weights."""
    options = ["-m", str(folder / "model.gguf"), "-f", str(arguments.text), "--chunks", str(arguments.chunks)]
    options += ["-c", "512", "-t", str(arguments.threads), "--verbosity", "4"]
    output, said = run(build, "llama-perplexity", options, way, variables)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", output + said)
    packed = re.search(r"packed (\d+) tensors, ([\d.]+) MiB instead of ([\d.]+) MiB", output + said)
    if found is None:
        raise SystemExit(f"llama-perplexity printed no estimate for {folder}")
    memory = {"tensors": int(packed[1]), "mib": float(packed[2]), "dense_mib": float(packed[3])} if packed else None
    return {"perplexity": float(found[1]), "packed": memory}


def table(results: dict[str, Any]) -> str:
    machine = results["machine"]
    lines = [
        "# Whole models in llama.cpp: sparse weights against its own dense kernels",
        "",
        f"{machine['processor']}, {machine['threads']} threads; a prompt of {machine['prompt']} tokens, "
        f"{machine['new_tokens']} new ones; tokens a second, medians of interleaved rounds by llama-bench. "
        "*Dense* is the same file in the same llama.cpp without the backend.",
        "",
        "| file | type | zeros | prefill dense | sparse | ratio | decode dense | sparse | ratio | perplexity dense "
        "| sparse | bits a weight |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in results["runs"].items():
        cells = [name, entry["about"]["type"], f"{entry['about']['zeros']:.0%}"]
        for part in ("prefill", "decode"):
            dense, sparse = (statistics.median(run[part] for run in entry[way]) for way in WAYS)
            ratio = statistics.median(
                ours[part] / theirs[part] for ours, theirs in zip(entry["sparse"], entry["dense"], strict=True)
            )
            cells += [f"{dense:.1f}", f"{sparse:.1f}", f"{ratio:.2f}"]
        quality = results["perplexity"].get(name, {})
        cells += [f"{quality[way]['perplexity']:.3f}" if way in quality else "" for way in WAYS]
        packed = quality.get("sparse", {}).get("packed")
        cells.append(f"{bits(entry['about']['type'], packed):.2f}" if packed else "dense")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def bits(kind: str, packed: dict[str, Any]) -> float:
    """Bits a weight of the packed tensors, from what the dense type takes."""
    dense = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q4_0": 4.5}[kind]
    return dense * float(packed["mib"]) / float(packed["dense_mib"])


if __name__ == "__main__":
    main()
