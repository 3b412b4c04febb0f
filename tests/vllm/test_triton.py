"""The GPU kernels without a GPU: interpreted against float64, and compiled for one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install --no-deps triton"
)
FOLDER = Path(__file__).resolve().parent
ASSEMBLY = FOLDER.parents[1] / "benchmarks" / "gpu_assembly.py"


def run(program: Path, *arguments: str, interpret: bool) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, str(program), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["bitmask", "nm", "codes"])
def test_interpreted_kernels(kernels: str) -> None:
    assert "checked" in run(FOLDER / "interpreted.py", kernels, "float32,float16,bfloat16", interpret=True)


@pytest.mark.parametrize("part", ["tuning", "operator"])
def test_table_and_operator(part: str, tmp_path: Path) -> None:
    assert "checked" in run(FOLDER / "interpreted.py", part, str(tmp_path), interpret=True)


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """They are valid for the hardware, spill no registers, and use tensor cores where they should."""
    output = tmp_path / "assembly"
    run(ASSEMBLY, "--only", "bitmask .* (1|16)$", "--output", str(output), interpret=False)
    rows = json.loads(output.with_suffix(".json").read_text())["rows"]
    assert {(row["values"], row["batch"]) for row in rows} == {
        (values, batch) for values in ("bfloat16", "int8", "int4") for batch in (1, 16)
    }
    assert all(row["spilled_bytes"] == 0 and row["loads"] > 0 for row in rows)
    assert all((row["products"] > 0) == row["kernel"].endswith("tensor") for row in rows)
