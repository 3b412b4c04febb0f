"""The GPU kernels without a GPU: interpreted against float64, and compiled for one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install --no-deps triton"
)
FOLDER = Path(__file__).resolve().parent


def run(program: str, *arguments: str, interpret: bool) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / program), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kernels", ["bitmask", "nm"])
def test_interpreted_kernels(kernels: str, dtype: str) -> None:
    assert "checked" in run("interpreted.py", kernels, dtype, interpret=True)


def test_table(tmp_path: Path) -> None:
    assert "checked" in run("interpreted.py", "tuning", str(tmp_path), interpret=True)


def test_kernels_compile_for_a_gpu() -> None:
    assert run("compiled.py", interpret=False).count("compiled") == 4
