"""Whole models that generate text: ours in llama.cpp against llama.cpp's own dense types, and other engines.

One script of more than 400 lines, because its three steps share their files, their cells and one results file.

    python benchmarks/end_to_end.py prepare FOLDER MODEL [50%=CHECKPOINT ...]     # a real model and its pruned ones
    python benchmarks/end_to_end.py prepare FOLDER MODEL --shape                  # random weights; MODEL's tokenizer
    python benchmarks/end_to_end.py run FOLDER [torch:dense=FOLDER ...] [--minutes 4]
    python benchmarks/end_to_end.py quality FOLDER --text FILE

``prepare`` writes GGUF files by llama.cpp's own converter and quantiser. ``run`` measures every cell once in each
round: a new process loads the file, warms up, and runs a prompt of 128 tokens and 64 new ones, one sequence and eight
at once. Finished samples are kept, so the run may be cut into pieces. Dense files run in llama.cpp as it is; pruned
files, and dense ones as *ours, no zeros*, with the backend for sparse weights. Further engines take an exported folder
or a checkpoint; ``torch`` runs compiled code, ``torch-eager`` does not. With ``--shape``, ``prepare`` also writes
packed folders for vLLM: ``run FOLDER "vllm:dense=FOLDER/scratch/random" "vllm:70% int8=FOLDER/scratch/vllm-70%-int8"``.
OpenVINO reads what was exported for ONNX Runtime: ``run FOLDER openvino:int8=ARTIFACT --peer-python ENV/bin/python``.
``quality`` takes the perplexity by llama-perplexity, of pruned files with and without the backend.

Writes benchmarks/results/end_to_end.json, .md and .svg. FOLDER's name is the model's in the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil

from sparsedeploy.artifacts.folder import describe_folder
from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.folders import write_json, write_text
from sparsedeploy.machine import usable_cores
from sparsedeploy.reporting.charts import Disc, scatter_chart, svg_file
from sparsedeploy.runtimes.engine import open_model
from sparsedeploy.runtimes.environments import require
from sparsedeploy.runtimes.installation import process_environment
from sparsedeploy.runtimes.llamacpp import build_of, offer
from sparsedeploy.targets.registry import export_checkpoint
from sparsedeploy.workflows.options import PruneOptions
from sparsedeploy.workflows.prune import prune

RESULTS = Path(__file__).resolve().parent / "results" / "end_to_end"
DENSE_TYPES = ("F16", "Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K")
SPARSE_TYPES = ("F16", "Q8_0", "Q4_0")
PROMPT = 128
# Llama 3.2 1B has 16 such layers and a vocabulary of 128,256: layers and vocabulary are cut alike, so that a token's
# time is that of the whole one times 6 / 16.
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 6, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip
RATES = {"50%": "0.5", "70%": "0.7", "2:4": "2:4"}
READING = "<!-- What follows is written by hand and kept when the tables are made anew. -->\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("prepare")
    make.add_argument("folder", type=Path)
    make.add_argument("model", type=Path)
    make.add_argument("pruned", nargs="*", help="NAME=CHECKPOINT")
    make.add_argument("--shape", action="store_true", help="random weights in the shape of Llama 3.2 1B")
    measured = commands.add_parser("run")
    measured.add_argument("folder", type=Path)
    measured.add_argument("others", nargs="*", help="ENGINE:NAME=FOLDER, such as torch:dense=MODEL")
    measured.add_argument("--peer-python", help="Python of an environment with openvino and nncf")
    measured.add_argument("--rounds", type=int, default=3)
    measured.add_argument("--new-tokens", type=int, default=64)
    measured.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    measured.add_argument("--minutes", type=float, default=1e9, help="stop then; run again to go on")
    measured.add_argument("--only", default="", help="a regular expression of cells")
    quality = commands.add_parser("quality")
    quality.add_argument("folder", type=Path)
    quality.add_argument("--text", type=Path, required=True)
    quality.add_argument("--chunks", type=int, default=16, help="windows of 512 tokens of it")
    quality.add_argument("--only", default="", help="a regular expression of files and ways")
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare(
            arguments.folder, arguments.model, dict(item.split("=", 1) for item in arguments.pruned), arguments.shape
        )
        return
    path = RESULTS.with_suffix(".json")
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"machine": {}, "models": {}}
    model = results["models"].setdefault(arguments.folder.name, {"cells": {}, "perplexity": {}})
    if arguments.command == "run":
        results["machine"] = {"processor": processor(), "threads": usable_cores()}
        run_cells(arguments, results, model, path)
    else:
        for file in sorted(arguments.folder.glob("*.gguf")):
            name, kind = file.stem.rsplit("-", 1)
            found = model["perplexity"].setdefault(f"{name} {kind}", {})
            for way in ("dense",) if name == "dense" else ("dense", "sparse"):
                if way not in found and re.search(arguments.only, f"{file.stem} {way}"):
                    found[way] = perplexity(file, way, arguments.text, arguments.chunks)
                    print(file.stem, way, found[way], flush=True)
                    write_json(path, results)
    write(results)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{fields.get('model name')}, model {fields.get('model')}"


# Files


def prepare(folder: Path, model: Path, pruned: dict[str, str], shape: bool) -> None:
    """Write dense-TYPE.gguf and NAME-TYPE.gguf; files that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    if shape:
        model = random_model(model, scratch / "random")
        pack_folders(model, scratch)
    kind = "f16" if shape else "f32"
    exact = {"dense": convert(model, scratch / "dense.gguf", kind)}
    if shape:
        for name, rate in RATES.items():
            exact[name] = scratch / f"{name}.gguf"
            if not exact[name].exists():
                partial = exact[name].with_suffix(".partial")
                shutil.copy(exact["dense"], partial)
                prune_file(partial, rate)
                partial.rename(exact[name])
    for name, checkpoint in pruned.items():
        exact[name] = convert(Path(checkpoint), scratch / f"{name}.gguf", kind)
    quantize = build_of(require("llamacpp")).program("llama-quantize")
    for name, source in exact.items():
        for target_kind in DENSE_TYPES if name == "dense" else SPARSE_TYPES:
            target = folder / f"{name}-{target_kind}.gguf"
            if not target.exists():
                partial = target.with_suffix(".partial")
                command = [str(quantize), str(source), str(partial), target_kind, str(usable_cores())]
                subprocess.run(command, check=True, capture_output=True)
                partial.rename(target)
                print(f"{target.name}: {target.stat().st_size / 1e6:.1f} MB", flush=True)


def convert(checkpoint: Path, target: Path, kind: str) -> Path:
    if not target.exists():
        environment = require("llamacpp")
        tool = environment.runtime.folder / "gguf_tool.py"
        partial = target.with_suffix(".partial")
        source = str(build_of(environment).source)
        command = [sys.executable, str(tool), "convert", source, str(checkpoint), str(partial), kind]
        subprocess.run(command, check=True, capture_output=True)
        partial.rename(target)
    return target


def random_model(tokenizer: Path, folder: Path) -> Path:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        words = AutoTokenizer.from_pretrained(tokenizer)
        config = LlamaConfig(**SHAPE, vocab_size=len(words))
        torch.set_default_dtype(torch.bfloat16)
        LlamaForCausalLM(config).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
        words.save_pretrained(folder)
    return folder


def pack_folders(model: Path, scratch: Path, rate: float = 0.7) -> None:
    """Artifacts for vLLM of the model without its smallest weights, their values in bfloat16, int8 and int4."""
    text = CalibrationOptions(data="stdlib", sequences=2, length=64)  # for the order of rounding alone
    kinds: dict[str, Literal["int8", "int4"] | None] = {"bf16": None, "int8": "int8", "int4": "int4"}
    for kind, codes in kinds.items():
        pruned, folder = scratch / f"pruned-{kind}", scratch / f"vllm-{rate:.0%}-{kind}"
        if not folder.is_dir():
            options = PruneOptions(rate, "magnitude", calibration=text, quantize=codes)
            prune(str(model), pruned, options)
            export_checkpoint(pruned, "vllm", folder)
            shutil.rmtree(pruned)


def prune_file(path: Path, rate: str) -> None:
    """Set the smallest weights of every row of the decoder layers' matrices to zero, in place."""
    sys.path.insert(0, str(build_of(require("llamacpp")).source / "gguf-py"))
    from gguf import GGUFReader

    for tensor in GGUFReader(path, "r+").tensors:
        if not tensor.name.startswith("blk.") or len(tensor.shape) != 2:
            continue
        weights = tensor.data
        if rate == "2:4":
            groups = weights.reshape(-1, 4)
            np.put_along_axis(groups, np.argsort(np.abs(groups), 1)[:, :2], 0, 1)
        else:
            sizes = np.abs(weights)
            cut = int(float(rate) * weights.shape[1])
            weights[sizes < np.partition(sizes, cut, axis=1)[:, cut : cut + 1]] = 0


# Speed


def run_cells(arguments: argparse.Namespace, results: dict[str, Any], model: dict[str, Any], path: Path) -> None:
    started = time.monotonic()
    cells: dict[str, tuple[str, str, Path]] = {}
    for file in sorted(arguments.folder.glob("*.gguf")):
        name, kind = file.stem.rsplit("-", 1)
        if name == "dense":
            cells[f"llama.cpp {kind}"] = ("llama.cpp", f"dense {kind}", file)
        if name != "dense" or kind in SPARSE_TYPES:
            title = f"ours {'no zeros' if name == 'dense' else name} {kind}"
            cells[title] = ("ours", f"{name} {kind}", file)
    for item in arguments.others:
        engine, name, folder = re.fullmatch(r"([^:=]+):([^=]+)=(.+)", item).groups()  # type: ignore[union-attr]
        cells[f"{engine} {name}"] = (engine, name, Path(folder))
    for number in range(arguments.rounds):
        for title, (engine, weights, file) in cells.items():
            if not re.search(arguments.only, title):
                continue
            size = (
                file.stat().st_size if file.is_file() else sum(f.stat().st_size for f in file.rglob("*") if f.is_file())
            )
            entry = model["cells"].setdefault(title, {"weights": weights, "bytes": size, "runs": []})
            if len(entry["runs"]) > number or time.monotonic() - started > 60 * arguments.minutes:
                continue
            how = (arguments.new_tokens, arguments.batches)
            if file.suffix == ".gguf":
                sample = llamacpp(file, engine == "ours", *how)
            elif engine == "openvino":
                sample = openvino(arguments.peer_python, weights, file, *how)
            else:
                sample = other(engine, file, *how)
            entry["runs"].append(sample)
            print(title, {key: round(value, 2) for key, value in sample.items()}, flush=True)
            write_json(path, results)


def prompt_of(vocabulary: int) -> list[int]:
    return [(17 * index + 5) % min(vocabulary, 1000) for index in range(PROMPT)]


def resident() -> float:
    """Megabytes that this process's children hold."""
    return sum(child.memory_info().rss for child in psutil.Process().children(recursive=True)) / 1e6


def llamacpp(file: Path, backend: bool, new_tokens: int, batches: list[int]) -> dict[str, float]:
    """One process of llama.cpp, with or without the backend for sparse weights."""
    os.environ["SPARSEDEPLOY_LLAMACPP"] = "auto" if backend else "off"
    sizes = {
        "prompt_length": PROMPT,
        "new_tokens": new_tokens + 1,
        "chunk": PROMPT,
        "cores": usable_cores(),
    }
    with require("llamacpp").worker(600) as worker:
        started = time.perf_counter()
        model = worker.call("load", folder=str(file.parent), file=file.name, batch=max(batches), **sizes)["model"]
        sample = {"load": time.perf_counter() - started}

        def measure(prompt: list[int], count: int, batch: int) -> dict[str, Any]:
            return worker.call("measure", model=model, prompt=prompt, decode_tokens=count, batch=batch)

        return {**sample, **timings(measure, new_tokens, batches), "megabytes": resident()}


def openvino(python: str, precision: str, folder: Path, new_tokens: int, batches: list[int]) -> dict[str, float]:
    """One process of OpenVINO on an ONNX artifact, its weights compressed to ``float32``, ``int8`` or ``int4``."""
    script = Path(__file__).parent / "peers" / "openvino_decode.py"
    command = [python, script, folder, precision, PROMPT, new_tokens, *batches]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    sample: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return sample


def other(engine: str, folder: Path, new_tokens: int, batches: list[int]) -> dict[str, float]:
    """One process of another engine, by the interface that ``sparsedeploy bench`` uses."""
    batches = [1] if engine == "deepsparse" else batches
    runtime = engine.removesuffix("-eager")
    if runtime == "torch":
        os.environ["SPARSEDEPLOY_TORCH"] = "eager" if engine.endswith("-eager") else "compiled"
    describe_folder(folder)
    started = time.perf_counter()
    options: dict[str, Any] = {"prompt_length": PROMPT, "new_tokens": new_tokens + 1, "batch": max(batches)}
    with open_model(folder, runtime=runtime, timeout=1200, **options) as model:
        sample = {"load": time.perf_counter() - started}

        def measure(prompt: list[int], count: int, batch: int) -> dict[str, Any]:
            return vars(model.measure(prompt, count, batch))

        return {**sample, **timings(measure, new_tokens, batches), "megabytes": resident()}


def timings(measure: Any, new_tokens: int, batches: list[int]) -> dict[str, float]:
    """Tokens a second, of the prompts and of the new tokens of all sequences."""
    prompt, found = prompt_of(1000), {}
    for batch in batches:
        measure(prompt, 4, batch)
        timing = measure(prompt, new_tokens, batch)
        found[f"prefill {batch}"] = batch * PROMPT / timing["prefill_seconds"]
        found[f"decode {batch}"] = batch / statistics.median(timing["decode_seconds"])
    return found


# Quality


def perplexity(file: Path, way: str, text: Path, chunks: int) -> float:
    environment = require("llamacpp")
    build = build_of(environment)
    command = [str(build.program("llama-perplexity")), "-m", str(file), "-f", str(text), "--chunks", str(chunks)]
    command += ["-c", "512", "-t", str(usable_cores()), *(offer() if way == "sparse" else ())]
    more = {"GGML_BACKEND_PATH": str(build.backend)} if way == "sparse" else {}
    variables = {**process_environment(environment.runtime), **more}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
    if found is None:
        raise SystemExit(f"llama-perplexity printed no estimate for {file}")
    return float(found[1])


# Tables


def middle(entry: dict[str, Any], key: str) -> float | None:
    values = [run[key] for run in entry["runs"] if key in run]
    return statistics.median(values) if values else None


def write(results: dict[str, Any]) -> None:
    path = RESULTS.with_suffix(".md")
    kept = path.read_text().partition(READING)[2] if path.is_file() else ""
    write_text(path, table(results) + "\n" + READING + kept)
    charts = []
    for name, model in results["models"].items():
        discs = []
        for title, entry in model["cells"].items():
            quality = quality_of(results, name, entry)
            speed = middle(entry, "decode 1")
            if quality and speed:
                group, _, kind = title.rpartition(" ")
                note = f" perplexity, {entry['bytes'] / 1e6:.0f} MB"
                discs.append(Disc(title, speed, quality, entry["bytes"], note, group, kind))
        if len(discs) > 1:
            chart = scatter_chart(
                discs,
                title=f"{name}: perplexity against speed",
                x_label="new tokens a second, one sequence",
                y_label="perplexity",
                log_y=True,
            )
            charts.append(chart)
    if charts:
        write_text(RESULTS.with_suffix(".svg"), svg_file(charts))


def quality_of(results: dict[str, Any], name: str, entry: dict[str, Any]) -> float | None:
    found = results["models"][name]["perplexity"].get(entry["weights"], {})
    value: float | None = found.get("sparse", found.get("dense"))
    return value


def table(results: dict[str, Any]) -> str:
    machine = results["machine"]
    keys = [f"{part} {batch}" for batch in (1, 8) for part in ("prefill", "decode")]
    lines = [
        "# Whole models: tokens a second, memory and perplexity",
        "",
        f"{machine.get('processor')}, {machine.get('threads')} threads. A prompt of {PROMPT} tokens and the new ones "
        "after it, one sequence (x1) and eight at once (x8, tokens of all of them); medians of interleaved rounds. "
        "*llama.cpp* is as it is; *ours* is the same llama.cpp with the backend for sparse weights; *no zeros* are the "
        "dense weights in our kernels. `decode` is against llama.cpp's dense type of the same name, of other engines "
        "against their own dense model. Memory is the process's, Python included.",
        "",
    ]
    for name, model in results["models"].items():
        head = ["", "file MB", "load s", "memory MB", *(key.replace(" ", " x") for key in keys), "decode", "perplexity"]
        if not any(entry["runs"] for entry in model["cells"].values()):
            continue
        lines += [f"## {name}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for title, entry in sorted(model["cells"].items(), key=lambda item: -(middle(item[1], "decode 1") or 0)):
            if not entry["runs"]:
                continue
            values = [entry["bytes"] / 1e6, middle(entry, "load"), middle(entry, "megabytes")]
            values += [middle(entry, key) for key in keys]
            own = model["cells"].get(f"{title.partition(' ')[0]} dense")
            base = model["cells"].get(f"llama.cpp {title.rsplit(' ', 1)[-1]}", own)
            quality = quality_of(results, name, entry)
            pairs = zip(entry["runs"], base["runs"], strict=False) if base else ()
            ratios = [ours["decode 1"] / theirs["decode 1"] for ours, theirs in pairs]
            cells = [title, *("" if value is None else f"{value:.4g}" for value in values)]
            cells += [f"{statistics.median(ratios):.2f}x" if ratios else "", f"{quality:.2f}" if quality else ""]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        both = {key: found for key, found in model["perplexity"].items() if len(found) == 2}
        if both:
            worst = max(abs(found["sparse"] / found["dense"] - 1) for found in both.values())
            lines += [f"The same pruned files with and without the backend: perplexities agree within {worst:.2%}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
