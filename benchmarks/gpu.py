"""Everything there is to know about the GPU kernels, in one command of at most nine minutes.

    python benchmarks/gpu.py [--minutes 9] [--parts kernels table ...]     # on a machine with a GPU
    TRITON_INTERPRET=1 python benchmarks/gpu.py --device cpu --small       # the flow, in Triton's interpreter

This file has more than 400 lines, because it is the one command that a machine with a GPU runs.
Needs torch, triton, transformers, safetensors, numpy and this checkout; nothing is installed or fetched. Parts:

- ``compile``: every kernel, in several processes, into Triton's cache
- ``kernels``: every kernel against a float64 product, odd shapes, all formats and dtypes
- ``table``: every configuration timed, the fastest kept
- ``products``: packed products against cuBLAS's dense ones and the byte limit, in CUDA graphs and with cold caches
- ``model``: decode of a Llama-shaped random model in transformers, dense and packed, in a CUDA graph
- ``prune``: ``prune`` on the device, its masks compared with those of the CPU

Every case is kept when it ends, so a run that is cut off goes on where it stopped; ``--fresh`` starts anew. A case that
fails is noted and the next one runs. Writes OUTPUT.json and OUTPUT.md.
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
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "export" / "vllm"), str(ROOT / "benchmarks")]
os.environ.setdefault("SPARSEDEPLOY_HOME", str(Path(tempfile.gettempdir()) / "sparsedeploy-gpu"))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch  # noqa: E402
import triton  # noqa: E402
from packed_linear import Timer, measure_copy, measure_products, pack_values, sparse_weight  # noqa: E402
from sparsedeploy_vllm import gpu, tuning  # noqa: E402
from torch import nn  # noqa: E402

from sparsedeploy.folders import write_json, write_text  # noqa: E402
from sparsedeploy.formats import packed as packing  # noqa: E402
from sparsedeploy.formats.packed import PackedWeight  # noqa: E402
from sparsedeploy.formats.product import Prepared, multiply  # noqa: E402

PARTS = ("compile", "kernels", "table", "products", "model", "prune")
# Share of the time that a part may take at most.
SHARES = {"compile": 0.2, "kernels": 0.2, "table": 0.25, "products": 0.3, "model": 0.3, "prune": 0.3}
# Llama 7B: attention, gate and up, down. Llama 8B: merged q, k and v, gate and up, down.
SHAPES = ("4096x4096", "11008x4096", "4096x11008", "6144x4096", "14336x4096", "4096x14336")
FORMATS = (
    "50% float", "50% int8", "50% int4", "70% float", "70% int8", "70% int4", "2:4 float", "2:8 float", "2:8 int8",
    "2:8 int4",
)  # fmt: skip
BATCHES = (1, 4, 16, 64)
BITS = {"float": 0, "int8": 8, "int4": 4}
DTYPE = torch.bfloat16
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 2**-18}
Case = tuple[str, Callable[[], dict[str, Any]]]


class Run:
    """What is measured, and what was measured already."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.small: bool = options.small
        self.path: Path = options.output.with_suffix(".json")
        self.started = time.monotonic()
        self.seconds = 60 * options.minutes
        old = json.loads(self.path.read_text()) if self.path.is_file() and not options.fresh else {}
        # Times of another device are no part of this run.
        self.results: dict[str, Any] = old if old.get("machine") == machine(self.device) else {}
        self.results.setdefault("machine", machine(self.device))
        self.results.setdefault("parts", {})
        self.timer = Timer(self.device, 1 << 16) if self.small else Timer(self.device)

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def part(self, name: str, cases: Iterator[Case]) -> None:
        """Run a part's cases until all are done or its time is up."""
        found = self.results["parts"].setdefault(name, {})
        until = time.monotonic() + min(self.left(), self.seconds * SHARES[name])
        for key, call in cases:
            if key in found and "error" not in found[key]:
                continue
            if time.monotonic() > until:
                print(f"{name}: out of time before {key}", flush=True)
                break
            started = time.monotonic()
            try:
                found[key] = call()
            except Exception as error:
                traceback.print_exc()
                found[key] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            found[key]["seconds"] = round(time.monotonic() - started, 2)
            print(name, key, {k: v for k, v in found[key].items() if not isinstance(v, list | dict)}, flush=True)
            write_json(self.path, self.results)
            write_text(self.path.with_suffix(".md"), markdown(self.results))


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}, interpreter"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def packed(kind: str, rows: int, columns: int, device: torch.device, dtype: torch.dtype = DTYPE) -> PackedWeight:
    """A random weight in a format such as ``50% int4``."""
    return pack(kind, sparse_weight(rows, columns, kind.split(maxsplit=1)[0], dtype, device))


def pack(kind: str, weight: torch.Tensor) -> PackedWeight:
    """A pruned weight in a format such as ``50% int4``."""
    pattern, values = kind.split()
    return pack_values(weight, pattern, BITS[values])


# compile


def compile_cases(run: Run) -> Iterator[Case]:
    yield "all", partial(compile_all, run)


def compile_all(run: Run) -> dict[str, Any]:
    """One process for each kind of kernel: they share the cores, and find each other's work in the cache."""
    kinds = ("50% float", "50% int8", "50% int4", "2:8 float", "2:8 int8", "2:8 int4", "2:4 float")
    command = [sys.executable, __file__, "--device", str(run.device), *(["--small"] if run.small else []), "--warm"]
    processes = [subprocess.Popen([*command, kind]) for kind in (kinds[:1] if run.small else kinds)]
    try:
        codes = [process.wait(timeout=max(1.0, run.left())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return {"failed": sum(code != 0 for code in codes)}


def warm(kind: str, device: torch.device, small: bool) -> None:
    """Compile every configuration of a format's kernels."""
    weight = gpu.prepare(packed(kind, 256, 1024, device))
    for batch in BATCHES[:1] if small else BATCHES:
        x = torch.randn(batch, 1024, device=device).to(DTYPE)
        for config in tuning.candidates(batch)[: 1 if small else None]:
            gpu.linear(x, weight, None, config)


# kernels


def kernel_cases(run: Run) -> Iterator[Case]:
    shapes = ((7, 128),) if run.small else ((7, 128), (70, 1056), (256, 4096))
    dtypes = (torch.float32,) if run.small else (torch.bfloat16, torch.float16, torch.float32)
    for kind in FORMATS[1:3] if run.small else FORMATS:
        for dtype in dtypes:
            for rows, columns in shapes:
                name = f"{kind} {str(dtype).removeprefix('torch.')} {rows}x{columns}"
                yield name, partial(check_kernel, run, kind, dtype, rows, columns)


def check_kernel(run: Run, kind: str, dtype: torch.dtype, rows: int, columns: int) -> dict[str, Any]:
    """Every configuration at several batches; ``worst`` is the error over what rounding allows."""
    stored = packed(kind, rows, columns, torch.device("cpu"), dtype)
    dense = packing.unpack(stored).double()
    weight = to_device(gpu.prepare(stored), run.device)
    unpacked = gpu.unpack(weight, dtype).cpu()
    worst, wrong = 0.0, []
    if not torch.allclose(unpacked, dense.to(dtype), rtol=2**-7 if run.small else 0, atol=0):
        wrong.append("unpack")
    for batch in (1, 4, 20) if run.small else (1, 2, 3, 4, 5, 16, 33, 64, 70):
        x, bias = torch.randn(batch, columns).to(dtype), torch.randn(rows).to(dtype)
        exact = x.double() @ dense.T + bias.double()
        allowed = TOLERANCE[dtype] * (x.double().abs() @ dense.abs().T + bias.double().abs())
        for config in (*(tuning.candidates(batch) if batch <= gpu.LARGEST_TENSOR_BATCH else ()), None):
            found = gpu.linear(x.to(run.device), weight, bias.to(run.device), config).cpu().double()
            error = float(((found - exact).abs() / allowed).max())
            worst = max(worst, error) if math.isfinite(error) else float("inf")
            if not error <= 1:
                wrong.append(f"batch {batch} {config}")
    return {"worst": worst, "wrong": wrong, "passed": not wrong}


def to_device(weight: gpu.GpuWeight, device: torch.device) -> gpu.GpuWeight:
    return weight.with_tensors({name: tensor.to(device) for name, tensor in weight.tensors().items()})


# table and products


def sizes(run: Run) -> tuple[str, ...]:
    return ("64x128",) if run.small else SHAPES


def table_cases(run: Run) -> Iterator[Case]:
    for shape in sizes(run):
        for kind in FORMATS[:3] if run.small else FORMATS:
            yield f"{shape} {kind}", partial(tune, run, shape, kind)


def tune(run: Run, shape: str, kind: str) -> dict[str, Any]:
    rows, columns = map(int, shape.split("x"))
    weight = gpu.prepare(packed(kind, rows, columns, run.device))
    found = tuning.tune(weight, DTYPE, partial(quick_time, run), BATCHES[:1] if run.small else BATCHES)
    times = {}
    for batch, timed in found.items():
        for config, milliseconds in timed.items():
            how = "dense" if config is None else f"{config.kernel} {config.rows}x{config.columns} warps {config.warps}"
            times[f"batch {batch} {how}"] = milliseconds
    return {"milliseconds": times}


def quick_time(run: Run, call: Callable[[], torch.Tensor]) -> float:
    if run.device.type == "cuda":
        return float(triton.testing.do_bench(call, warmup=5, rep=15, return_mode="median"))
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def product_cases(run: Run) -> Iterator[Case]:
    copy = measure_copy(run.timer, 1 << 16) if run.small else measure_copy(run.timer)
    yield "copy", lambda: {"gb_per_s": copy}
    for shape in sizes(run):
        for kind in FORMATS[:3] if run.small else FORMATS:
            yield f"{shape} {kind}", partial(measure, run, copy, shape, kind)


def measure(run: Run, copy: float, shape: str, kind: str) -> dict[str, Any]:
    rows, columns = map(int, shape.split("x"))
    pattern, values = kind.split()
    weight = sparse_weight(rows, columns, pattern, DTYPE, run.device)
    stored = pack(kind, weight)
    ready = gpu.prepare(stored)
    batches = BATCHES[:1] if run.small else BATCHES
    names = (shape, pattern, values)
    found = measure_products(run.timer, copy, weight, stored, names, batches, 2 if run.small else 20, ready)
    return {"rows": [vars(row) for row in found]}


# model


class PackedModule(nn.Module):
    """A linear without a bias, whose weight is packed."""

    def __init__(self, weight: Prepared) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return multiply(x, self.weight)


def model_cases(run: Run) -> Iterator[Case]:
    for kind in ("dense", *(FORMATS[1:2] if run.small else FORMATS)):
        for batch in (1,) if run.small else (1, 8):
            yield f"{kind} x{batch}", partial(decode, run, kind, batch)


def llama(run: Run) -> Any:
    """Llama 7B with a quarter of its layers, random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8, "num_attention_heads": 32}
    narrow = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(**(narrow if run.small else wide), vocab_size=256 if run.small else 32000)
    torch.manual_seed(0)
    with torch.device(run.device):
        return LlamaForCausalLM(config).to(DTYPE).eval().requires_grad_(False)


@torch.no_grad()
def decode(run: Run, kind: str, batch: int) -> dict[str, Any]:
    """Milliseconds of a new token after a prompt; the packed model's logits beside those of its unpacked weights."""
    from transformers import StaticCache

    model = llama(run)
    reference = None
    ids = torch.arange(batch * 16, device=run.device).view(batch, 16) % 256
    if kind != "dense":
        linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
        packs: dict[str, PackedWeight] = {}
        for name, linear in linears:
            rows, columns = linear.weight.shape
            kept = sparse_weight(rows, columns, kind.split(maxsplit=1)[0], DTYPE, run.device) != 0
            weight = torch.where(kept, linear.weight, torch.zeros((), dtype=DTYPE, device=run.device))
            packs[name] = pack(kind, weight)
            linear.weight.data = packing.unpack(packs[name]).to(DTYPE)
        reference = model(ids).logits.float()
        for name, stored in packs.items():
            model.set_submodule(name, PackedModule(gpu.prepare(stored)))
    result: dict[str, Any] = {}
    if reference is not None:
        found = model(ids).logits.float()
        result["logits_off"] = float((found - reference).abs().max() / reference.abs().max())
    cache = StaticCache(config=model.config, max_cache_len=256)
    model(ids, past_key_values=cache, use_cache=True)
    token = ids[:, :1].clone()
    rounds = 2 if run.small else 60

    def step() -> None:
        model(token, past_key_values=cache, use_cache=True)

    result["eager_ms"] = statistics.median(clock(run, step) for _ in range(rounds))
    if run.device.type == "cuda":
        replay = run.timer.recorded(step)
        result["graph_ms"] = statistics.median(clock(run, replay) for _ in range(rounds))
        result["gigabytes"] = torch.cuda.memory_allocated() / 1e9
    return result


def clock(run: Run, call: Callable[[], object]) -> float:
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


# prune


def prune_cases(run: Run) -> Iterator[Case]:
    for method in ("magnitude", "wanda", "sparsegpt")[: 2 if run.small else None]:
        for pattern in ("unstructured", "2:4")[: 1 if run.small else None]:
            yield f"{method} {pattern}", partial(compare_masks, run, method, pattern)


def compare_masks(run: Run, method: str, pattern: str) -> dict[str, Any]:
    """Prune the shipped model on the CPU and on the device."""
    from safetensors.torch import load_file

    from sparsedeploy.calibration.options import CalibrationOptions
    from sparsedeploy.reference import reference_model
    from sparsedeploy.workflows.options import PruneOptions, RunOptions
    from sparsedeploy.workflows.prune import prune

    text = CalibrationOptions(data="stdlib", sequences=8, length=128)
    seconds, weights = {}, {}
    for device in dict.fromkeys(("cpu", str(run.device))):
        with tempfile.TemporaryDirectory() as folder:
            options = PruneOptions(sparsity=0.5, method=method, pattern=pattern, calibration=text)
            started = time.perf_counter()
            prune(str(reference_model("tiny")), Path(folder) / "out", options, RunOptions(device=device))
            seconds[device] = time.perf_counter() - started
            files = sorted((Path(folder) / "out").glob("*.safetensors"))
            weights[device] = {name: tensor for file in files for name, tensor in load_file(file).items()}
    ours, theirs = weights["cpu"], weights[str(run.device)]
    same = sum(int(((ours[name] == 0) == (theirs[name] == 0)).sum()) for name in ours)
    total = sum(tensor.numel() for tensor in ours.values())
    far = max(float((ours[n].float() - theirs[n].float()).abs().max()) for n in ours)
    return {"masks_equal": same / total, "weights_off": far, "seconds_by_device": seconds}


# pages


def markdown(results: dict[str, Any]) -> str:
    parts = results["parts"]
    lines = ["# The GPU kernels", "", ", ".join(f"{k} {v}" for k, v in results["machine"].items()), ""]
    lines += ["Made by `benchmarks/gpu.py`, which says what is measured.", ""]
    kernels = parts.get("kernels", {})
    wrong = [key for key, found in kernels.items() if not found.get("passed")]
    if kernels:
        lines += [f"## Correctness: {len(kernels) - len(wrong)} of {len(kernels)} cases", ""]
        lines += [f"- wrong: {key}: {kernels[key].get('error') or kernels[key]['wrong'][:3]}" for key in wrong]
        lines.append("")
    products = {key: found for key, found in parts.get("products", {}).items() if "rows" in found}
    if products:
        lines += ["## Products against cuBLAS", "", f"Copy: {parts['products']['copy']['gb_per_s']:.0f} GB/s.", ""]
        lines += ["| shape | weight | batch | cuBLAS ms | packed ms | speedup | limit | of copy |", "|---" * 8 + "|"]
        for found in products.values():
            lines += [
                f"| {row['shape']} | {row['pattern']} {row['values']} | {row['batch']} | {row['dense_ms']:.4f} | "
                f"{row['packed_ms']:.4f} | {row['speedup']:.2f}x | {row['limit']:.2f}x | {row['of_copy']:.0%} |"
                for row in found["rows"]
            ]
        lines.append("")
    for name, found in parts.items():
        if name in ("kernels", "products", "table"):
            continue
        lines += [f"## {name}", ""]
        for key, values in found.items():
            told = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
            lines.append(f"- {key}: {told}")
        lines.append("")
    fastest = {
        key: best(found["milliseconds"]) for key, found in parts.get("table", {}).items() if "milliseconds" in found
    }
    if fastest:
        lines += ["## Fastest configurations", ""]
        lines += [f"- {key}: {told}" for key, told in fastest.items()]
    failed = [
        f"- {name} {key}: {v['error']}" for name, found in parts.items() for key, v in found.items() if "error" in v
    ]
    if failed:
        lines += ["", "## Failed", "", *failed]
    return "\n".join(lines).rstrip() + "\n"


def best(milliseconds: dict[str, float]) -> str:
    """The fastest way for each batch."""
    found: dict[str, tuple[float, str]] = {}
    for key, value in milliseconds.items():
        _, batch, how = key.split(" ", 2)
        found[batch] = min(found.get(batch, (float("inf"), "")), (value, how))
    return "; ".join(f"batch {batch} {how} {value:.4f} ms" for batch, (value, how) in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes: shows that everything runs, measures nothing")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has measured")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device. Try the flow: TRITON_INTERPRET=1 ... --device cpu --small")
    if device.type == "cpu" and not gpu.INTERPRETED:
        sys.exit("error: Triton's kernels run on a CPU only in its interpreter: set TRITON_INTERPRET=1")
    torch.backends.cuda.matmul.allow_tf32 = False
    if options.warm:
        warm(options.warm, device, options.small)
        return
    run = Run(options)
    cases = {
        "compile": compile_cases, "kernels": kernel_cases, "table": table_cases, "products": product_cases,
        "model": model_cases, "prune": prune_cases,
    }  # fmt: skip
    for name in PARTS:
        if name in options.parts and run.left() > 0:
            run.part(name, cases[name](run))
    print(f"{time.monotonic() - run.started:.0f} s; {run.path} and {run.path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
