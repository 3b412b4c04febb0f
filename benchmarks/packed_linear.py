"""Packed against dense products, for the projections of 7B and 8B models: times, share of the byte limit, bandwidth.

    python benchmarks/packed_linear.py [--device cpu|cuda] [--shapes 4096x4096 ...] [--output benchmarks/results/NAME]

Needs the ``sparsedeploy_vllm`` package (installed, or found in this checkout). Each weight comes from memory: caches
are filled with other data between any two measurements. Dense and packed are measured by turns and the best of each is
taken, so that what else runs on the machine disturbs both alike. Only ratios inside one run carry over. With
``OMP_NUM_THREADS=1`` the processor's time counts, not the clock's.

Columns: ``speedup`` is dense time over packed time. ``limit`` is dense bytes over packed bytes: the largest speedup
when the dense product already waits for nothing but memory; ``share`` is one over the other, and above 100 % where it
does not. ``of copy`` is the packed weight's bytes per second over those of a measured copy (reads plus writes): how
near the packed product itself comes to the memory's limit.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("sparsedeploy_vllm") is None:
    sys.path.append(str(ROOT / "export" / "vllm"))

from sparsedeploy_vllm import choice  # noqa: E402

from sparsedeploy.folders import write_json, write_text  # noqa: E402
from sparsedeploy.formats import packed as packing  # noqa: E402
from sparsedeploy.formats import quantized  # noqa: E402
from sparsedeploy.formats.packed import FloatWeight, PackedWeight  # noqa: E402
from sparsedeploy.formats.product import Prepared, multiply, prepare  # noqa: E402
from sparsedeploy.grid import by_column  # noqa: E402
from sparsedeploy.plan import NM  # noqa: E402

# Outputs x inputs. Llama 7B: attention, gate and up, down. Llama 8B: merged q, k and v, gate and up, down.
SHAPES = ("4096x4096", "11008x4096", "4096x11008", "6144x4096", "14336x4096", "4096x14336")
PATTERNS = ("50%", "60%", "70%", "80%", "2:4", "2:8")
BATCHES = (1, 4, 16, 64)
# What a weight is stored as: bits of its codes; 0 for its own dtype.
VALUES = {"float": 0, "int8": 8, "int4": 4}
GROUP = 32
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_FLUSH_VALUES = 32 << 20
_COPY_BYTES = 256 << 20


@dataclass(frozen=True)
class Row:
    """One measured case; times in milliseconds, bandwidth in GB/s."""

    shape: str
    pattern: str
    values: str
    batch: int
    dense_ms: float
    packed_ms: float
    packed_bytes: int
    speedup: float
    limit: float
    share: float
    gb_per_s: float
    of_copy: float


class Timer:
    """Milliseconds of a call on a device, with cold caches."""

    def __init__(self, device: torch.device, flush_values: int = _FLUSH_VALUES) -> None:
        self.device = device
        # One thread is timed by the processor time that it had, so that other work on the machine disturbs less.
        self.clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self.flush = torch.ones(flush_values, device=device)

    def recorded(self, call: Callable[[], object]) -> Callable[[], object]:
        """On a GPU, the call as a CUDA graph, so that Python's time does not count."""
        if self.device.type != "cuda":
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def once(self, call: Callable[[], object]) -> float:
        # Read, not written: what is written goes back to memory while the product runs.
        self.flush.sum()
        if self.device.type == "cuda":
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            call()
            after.record()
            torch.cuda.synchronize()
            return before.elapsed_time(after)
        started = self.clock()
        call()
        return (self.clock() - started) * 1e3

    def best(self, calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
        """The best time of each call over interleaved rounds, after one round that warms up."""
        ready = [self.recorded(call) for call in calls]
        for call in ready:
            call()
        times = [[self.once(call) for call in ready] for _ in range(rounds)]
        return [min(column) for column in zip(*times, strict=True)]


def sparse_weight(rows: int, columns: int, pattern: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random weights with random zeros in the pattern: ``70%`` or N:M."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(rows, columns, device=device, generator=generator).to(dtype)
    noise = torch.rand(rows, columns, device=device, generator=generator)
    if pattern.endswith("%"):
        keep = noise >= float(pattern[:-1]) / 100
    else:
        n, m = NM.parse(pattern).n, NM.parse(pattern).m
        groups = noise.view(rows, columns // m, m)
        keep = (groups.argsort(dim=2).argsort(dim=2) < n).view(rows, columns)
    return torch.where(keep, weight, torch.zeros((), dtype=dtype, device=device))


def pack_weight(weight: torch.Tensor, pattern: str) -> FloatWeight:
    return packing.pack(weight, "bitmask" if pattern.endswith("%") else pattern)


def code_weight(weight: torch.Tensor, pattern: str, bits: int) -> PackedWeight:
    """A weight rounded to codes of 8 or 4 bits with a scale for every 32 columns; a code of a kept weight is not 0."""
    largest = 2 ** (bits - 1) - 1
    scales = (weight.float().abs().view(len(weight), -1, GROUP).amax(dim=2) / largest).half()
    steps = weight.float() / by_column(scales, GROUP, weight.shape[1]).clamp(min=1e-8)
    codes = steps.round().clamp(-largest, largest).to(torch.int8)
    codes = torch.where((weight != 0) & (codes == 0), torch.ones_like(codes), codes)
    return quantized.pack(codes, scales, bits, GROUP, None if pattern.endswith("%") else NM.parse(pattern))


def pack_values(weight: torch.Tensor, pattern: str, bits: int) -> PackedWeight:
    """A pruned weight packed as it is (0 bits), or as codes."""
    return code_weight(weight, pattern, bits) if bits else pack_weight(weight, pattern)


def measure_copy(timer: Timer, size: int = _COPY_BYTES) -> float:
    """GB/s of a large copy, reads and writes counted."""
    source = torch.ones(size, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    (best,) = timer.best([lambda: target.copy_(source)], 10)
    return 2 * size / best / 1e6


def measure_format(weight: torch.Tensor, pattern: str, clock: Callable[[], float]) -> dict[str, float | str]:
    """Size and pack and unpack speed, in GB of dense weight per second."""
    packed = pack_weight(weight, pattern)
    seconds = {}
    for name, call in (
        ("pack", lambda: pack_weight(weight, pattern)),
        ("check", lambda: packing.check(packed, "weight")),
        ("unpack", lambda: packing.unpack(packed)),
    ):
        times = []
        for _ in range(3):
            started = clock()
            call()
            times.append(clock() - started)
        seconds[name] = min(times)
    dense = weight.numel() * weight.element_size()
    sparsity = 1 - packed.count / weight.numel()
    wanted = 1 / (8 * weight.element_size()) + 1 - sparsity
    return {
        "pattern": pattern,
        "size": packing.size(packed) / dense,
        "of_bitmask_size": packing.size(packed) / dense / wanted,
        **{f"{name}_gb_per_s": dense / value / 1e9 for name, value in seconds.items()},
    }


def run(
    shapes: Sequence[str],
    patterns: Sequence[str],
    values: Sequence[str],
    batches: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    """Measure every case and print a line for each."""
    timer = Timer(device)
    copy = measure_copy(timer)
    print(f"{device_name(device)}, {threads(device)}, {dtype}: copy {copy:.1f} GB/s")
    print(
        f"{'shape':>12} {'pattern':>7} {'values':>6} {'batch':>5} {'dense ms':>9} {'packed ms':>9} {'speedup':>8} "
        f"{'limit':>6} ",
        end="",
    )
    print(f"{'share':>6} {'GB/s':>7} {'of copy':>7}")
    rows: list[Row] = []
    choices: dict[str, str] = {}
    formats: list[dict[str, float | str]] = []
    for shape, pattern in itertools.product(shapes, patterns):
        outputs, inputs = (int(size) for size in shape.split("x"))
        weight = sparse_weight(outputs, inputs, pattern, dtype, device)
        if shape == shapes[0]:
            formats.append(measure_format(weight, pattern, timer.clock))
        for kind in values:
            bits = VALUES[kind]
            stored = pack_values(weight, pattern, bits)
            if device.type == "cpu":
                decision = choice.measure(stored, dtype)
                choices[f"{shape} {pattern} {kind}"] = "packed" if decision.packed else "dense"
            else:
                from sparsedeploy_vllm import gpu, tuning

                tuning.tune(gpu.prepare(stored), dtype)
            rows += measure_products(timer, copy, weight, stored, (shape, pattern, kind), batches, rounds)
    return {
        "device": device_name(device),
        "threads": threads(device),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "copy_gb_per_s": copy,
        "rounds": rounds,
        "rows": [asdict(row) for row in rows],
        "choice_at_load": choices,
        "formats": formats,
    }


def measure_products(
    timer: Timer,
    copy: float,
    weight: torch.Tensor,
    stored: PackedWeight,
    names: tuple[str, str, str],
    batches: Sequence[int],
    rounds: int,
    ready: Prepared | None = None,
) -> list[Row]:
    """Dense and packed products of one weight, for every batch.

    Args:
        copy: GB/s of a copy.
        names: shape, pattern and values.
        ready: the prepared weight; None prepares it for its device.
    """
    ready = prepare(stored) if ready is None else ready
    size = packing.size(stored)
    limit = weight.numel() * weight.element_size() / size
    rows = []
    for batch in batches:
        x = torch.randn(batch, weight.shape[1], device=weight.device).to(weight.dtype)
        dense_ms, packed_ms = timer.best((partial(functional.linear, x, weight), partial(multiply, x, ready)), rounds)
        rate, speedup = size / packed_ms / 1e6, dense_ms / packed_ms
        row = Row(*names, batch, dense_ms, packed_ms, size, speedup, limit, speedup / limit, rate, rate / copy)
        rows.append(row)
        shape, pattern, kind = names
        print(
            f"{shape:>12} {pattern:>7} {kind:>6} {batch:>5} {dense_ms:>9.3f} {packed_ms:>9.3f} {speedup:>7.2f}x "
            f"{limit:>5.2f}x {row.share:>6.0%} {rate:>7.1f} {row.of_copy:>7.0%}",
            flush=True,
        )
    return rows


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def threads(device: torch.device) -> str:
    count = torch.get_num_threads()
    return "GPU" if device.type == "cuda" else f"{count} threads" if count > 1 else "1 thread"


def markdown(result: dict[str, Any]) -> str:
    """The result as the tables of a page."""
    lines = [
        f"# Packed products: {result['device']}, {result['threads']}, {result['dtype']}",
        "",
        f"torch {result['torch']}, copy {result['copy_gb_per_s']:.1f} GB/s, best of {result['rounds']} interleaved "
        "rounds, cold caches. Made by `benchmarks/packed_linear.py`, which says what the columns mean.",
        "",
        "| shape | pattern | values | batch | dense ms | packed ms | speedup | limit | share | GB/s | of copy |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['shape']} | {row['pattern']} | {row['values']} | {row['batch']} | {row['dense_ms']:.3f} | "
            f"{row['packed_ms']:.3f} | "
            f"{row['speedup']:.2f}x | {row['limit']:.2f}x | {row['share']:.0%} | {row['gb_per_s']:.1f} | "
            f"{row['of_copy']:.0%} |"
        )
    lines += ["", "What the rule at load time decides (batch 1):", "", "| case | decision |", "|---|---|"]
    lines += [f"| {case} | {decision} |" for case, decision in result["choice_at_load"].items()]
    lines += [
        "",
        "The formats in Python (`pack`, `check`, `unpack`; GB of dense weight per second):",
        "",
        "| pattern | size of dense | against 1/bits + 1 - s | pack | check | unpack |",
        "|---|---|---|---|---|---|",
    ]
    for entry in result["formats"]:
        lines.append(
            f"| {entry['pattern']} | {entry['size']:.4f} | {entry['of_bitmask_size']:.4f} | "
            f"{entry['pack_gb_per_s']:.2f} | {entry['check_gb_per_s']:.2f} | {entry['unpack_gb_per_s']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--values", nargs="+", choices=VALUES, default=list(VALUES))
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    dtype, device = DTYPES[options.dtype], torch.device(options.device)
    result = run(options.shapes, options.patterns, options.values, options.batches, dtype, device, options.rounds)
    if options.output:
        write_json(options.output.with_suffix(".json"), result)
        write_text(options.output.with_suffix(".md"), markdown(result))


if __name__ == "__main__":
    main()
