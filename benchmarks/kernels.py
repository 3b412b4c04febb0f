"""The packed products of ``export/kernels`` against dense ones of the same values, on the CPU at hand.

    python benchmarks/kernels.py [--ggml BUILD SOURCE] [--types q8_0 q4_0 ...] [--output benchmarks/results/kernels]

``--ggml`` names a build folder of llama.cpp and its sources: the dense product is then that of ggml's CPU backend, with
repacked weights where llama.cpp would repack them. Without it, only the packed products are timed.

Every matrix of a case comes from memory: copies that fill ``--megabytes`` are multiplied once each in a round, and
before every round the caches are filled with other data. One thread is timed by its processor time, several by the
clock; dense and packed are measured by turns and the best round of each counts. Only ratios inside one run carry over.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from sparsedeploy.folders import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "export" / "kernels"
# "full": no zeros, no masks.
RATES = ("full", "0.5", "0.7")


@dataclass(frozen=True)
class Row:
    """One case; microseconds of one product, and bytes of the weight."""

    isa: str
    type: str
    shape: str
    batch: int
    threads: int
    sparsity: str
    microseconds: float
    dense_microseconds: float | None
    speedup: float | None
    bits_per_weight: float
    gb_per_s: float
    dense: str


def compile_program(folder: Path, ggml: list[str] | None) -> Path:
    """The timing program with the kernels inside.

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    program = folder / "product"
    sources = [KERNELS / "time" / "product.cpp", *sorted((KERNELS / "src").glob("*.cpp"))]
    command = [
        "g++",
        "-O3",
        "-std=c++17",
        "-pthread",
        f"-I{KERNELS / 'include'}",
        *map(str, sources),
        "-o",
        str(program),
    ]
    if ggml:
        build, source = ggml
        command += ["-DWITH_GGML", f"-I{source}/ggml/include", f"-I{source}/ggml/src", f"-L{build}/bin"]
        command += ["-lggml", "-lggml-base", "-lggml-cpu", f"-Wl,-rpath,{build}/bin"]
    subprocess.run(command, check=True)
    return program


def measure(
    program: Path, isa: str, kind: str, shape: str, batch: int, threads: int, megabytes: float, rounds: int
) -> list[Row]:
    rows, columns = map(int, shape.split("x"))
    numbers = (rows, columns, batch, threads, megabytes, rounds)
    environment = {**os.environ, "SPARSEDEPLOY_ISA": isa}
    command = [str(program), kind, *map(str, numbers), *RATES]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    lines = [line.split("\t") for line in output.stdout.decode().splitlines()]
    dense = next((line for line in lines if line[0].startswith("dense")), None)
    result = []
    for name, seconds, size, used in lines:
        if name.startswith("dense"):
            continue
        time = float(seconds) * 1e6
        dense_time = float(dense[1]) * 1e6 if dense else None
        result.append(
            Row(
                used,
                kind,
                shape,
                batch,
                threads,
                name,
                round(time, 1),
                None if dense_time is None else round(dense_time, 1),
                None if dense_time is None else round(dense_time / time, 2),
                round(float(size) * 8 / rows / columns, 2),
                round(float(size) / time / 1e3, 2),
                dense[0] if dense else "",
            )
        )
    return result


def table(rows: list[Row]) -> str:
    head = "| kernels | type | shape | batch | threads | zeros | packed µs | dense µs | speedup | bits | GB/s | dense |"
    lines = [head, "|" + "---|" * 12]
    for row in rows:
        cells = (
            row.isa,
            row.type,
            row.shape,
            row.batch,
            row.threads,
            row.sparsity if row.sparsity == "full" else f"{float(row.sparsity):.0%}",
            row.microseconds,
            row.dense_microseconds,
            row.speedup,
            row.bits_per_weight,
            row.gb_per_s,
            row.dense,
        )
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in found.items()}
    return f"{fields.get('model name', platform.processor())}, model {fields.get('model')}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", nargs=2, metavar=("BUILD", "SOURCE"))
    parser.add_argument("--isas", nargs="+", default=["avx512bf16", "avx2"])
    parser.add_argument("--types", nargs="+", default=["q8_0", "q4_0"])
    parser.add_argument("--shapes", nargs="+", default=["1536x576", "2048x2048", "8192x2048", "4096x14336"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 16, 64, 256])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "kernels")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = compile_program(Path(folder), options.ggml)
        rows: list[Row] = []
        for threads in options.threads:
            for kind in options.types:
                for isa in options.isas:
                    for shape in options.shapes:
                        for batch in options.batches:
                            # A larger batch takes longer, so fewer matrices make a round.
                            megabytes = options.megabytes / batch
                            rows += measure(program, isa, kind, shape, batch, threads, megabytes, options.rounds)
                            print(table(rows[-len(RATES) :]).splitlines()[-1], flush=True)
    text = f"Processor: {processor()}\n\n{table(rows)}\n"
    write_json(options.output.with_suffix(".json"), {"processor": processor(), "rows": [asdict(row) for row in rows]})
    write_text(options.output.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
