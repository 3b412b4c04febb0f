"""What the GPU kernels compile to: registers, spills, and instructions of the main loop. Needs no GPU; nothing is run.

    python benchmarks/gpu_assembly.py [--only REGULAR_EXPRESSION] [--target 90]

Each kernel is compiled with the configuration that is used before a device has been measured. The main loop is the
longest one in the machine code; its instructions are counted for a warp and given for every 8 weights of a thread.
Writes benchmarks/results/gpu_assembly.json and .md.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "export" / "vllm")]

from sparsedeploy_vllm import triton_kernels as kernels  # noqa: E402
from sparsedeploy_vllm import tuning  # noqa: E402

from sparsedeploy.folders import write_json, write_text  # noqa: E402

TOOLS = Path(triton.__file__).resolve().parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "x_ptr": "*bf16", "bias_ptr": "*bf16", "out_ptr": "*bf16", "mask_ptr": "*u8", "positions_ptr": "*u8",
    "offsets_ptr": "*i32", "scales_ptr": "*fp16",
}  # fmt: skip
# Of each kind of values: bits, and what the values' pointer is for a bitmask and for N:M.
VALUES = {"bfloat16": (0, "*bf16", "*bf16"), "int8": (8, "*i32", "*i8"), "int4": (4, "*i32", "*u8")}
GROUP = 32
# The width that a pointer's address and every size are multiples of.
ALIGNED = [["tt.divisibility", 16]]
LOADS, SHARED, PRODUCTS = r"LDG", r"LDS|STS|LDSM|STSM", r"HMMA|HGMMA"


@dataclass(frozen=True)
class Row:
    """A compiled kernel; instructions are those of the main loop for every 8 weights of a thread."""

    kernel: str
    values: str
    batch: int
    rows: int
    columns: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: float
    loads: float
    shared: float
    products: int


def cases() -> Iterator[tuple[str, str, int]]:
    for layout in ("bitmask", "2:8"):
        for values in VALUES:
            for batch in (1, 4, 16, 64):
                yield layout, values, batch


def compile_case(layout: str, values: str, batch: int, target: int) -> tuple[Any, tuning.Config]:
    """The compiled kernel for a weight of a format and a batch."""
    config = tuning.candidates(batch)[0]
    bits, of_bitmask, of_nm = VALUES[values]
    constants = {"BATCH": batch, "ROWS": config.rows, "BITS": bits, "GROUP": GROUP, "HAS_BIAS": 0}
    if config.kernel == "tensor":
        constants["WIDEN"] = 0
    if layout == "bitmask":
        kernel = kernels._bitmask_vector if config.kernel == "vector" else kernels._bitmask_tensor
        constants["BYTES"] = config.columns // 8
    else:
        kernel = kernels._nm_vector if config.kernel == "vector" else kernels._nm_tensor
        constants.update(GROUPS=config.columns // 8, FIELD=6, N=2, M=8)
    pointers = {**POINTERS, "values_ptr": of_bitmask if layout == "bitmask" else of_nm}
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # A batch is no multiple of 16.
        attrs={(i,): ALIGNED for i, name in enumerate(names) if name not in constants and name != "batch"},
    )
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options), config


def tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(TOOLS / name), *arguments], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def main_loop(assembly: str) -> list[str]:
    """The instructions of the longest loop: from a label to the last branch that goes back to it."""
    lines = [line for line in assembly.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/", line)]
    places = {int(re.search(r"/\*([0-9a-f]{4,})\*/", line)[1], 16): index for index, line in enumerate(lines)}  # type: ignore[index]
    longest: list[str] = []
    for index, line in enumerate(lines):
        jump = re.search(r"BRA\S*\s+(?:\S+,\s*)*`?\(?(0x[0-9a-f]+)", line)
        start = places.get(int(jump[1], 16)) if jump else None
        if start is not None and start < index and index - start > len(longest):
            longest = lines[start : index + 1]
    return longest


def measure(layout: str, values: str, batch: int, target: int) -> Row:
    compiled, config = compile_case(layout, values, batch, target)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = tool("cuobjdump", "-res-usage", str(cubin))
        loop = main_loop(tool("cuobjdump", "-sass", str(cubin)))
    figures = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    eights = config.rows * config.columns / (config.warps * 32) / 8

    def count(pattern: str) -> int:
        return sum(re.search(rf"\b({pattern})\b", line) is not None for line in loop)

    return Row(
        f"{layout} {config.kernel}",
        values,
        batch,
        config.rows,
        config.columns,
        figures["REG"],
        figures.get("STACK", 0) + figures.get("LOCAL", 0),
        compiled.metadata.shared,
        round(len(loop) / eights, 1),
        round(count(LOADS) / eights, 2),
        round(count(SHARED) / eights, 2),
        count(PRODUCTS),
    )


def markdown(rows: list[Row], target: int) -> str:
    lines = [
        f"# The GPU kernels in machine code for sm_{target}",
        "",
        f"Triton {triton.__version__}; **untested on GPU**: compiled and counted, not run. Scales for every {GROUP} "
        "columns, x in bfloat16. Instructions are those of the main loop, for every 8 weights of a thread, zeros "
        "included; `spilled` is stack and local memory of a thread. Made by `benchmarks/gpu_assembly.py`.",
        "",
        "| kernel | values | batch | tile | registers | spilled B | shared B | instructions | global loads | "
        "shared memory | mma |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.kernel} | {row.values} | {row.batch} | {row.rows}x{row.columns} | {row.registers} | "
            f"{row.spilled_bytes} | {row.shared_bytes} | {row.instructions} | {row.loads} | {row.shared} | "
            f"{row.products} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression of `layout values batch`")
    parser.add_argument("--target", type=int, default=90, help="compute capability, such as 90 or 80")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_assembly")
    options = parser.parse_args()
    rows = []
    for case in cases():
        if re.search(options.only, " ".join(map(str, case))):
            rows.append(measure(*case, options.target))
            print(rows[-1], flush=True)
    write_json(options.output.with_suffix(".json"), {"target": options.target, "rows": [asdict(row) for row in rows]})
    write_text(options.output.with_suffix(".md"), markdown(rows, options.target))


if __name__ == "__main__":
    main()
