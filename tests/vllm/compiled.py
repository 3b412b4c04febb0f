"""Compile the Triton kernels for a GPU that need not be there. Run as a program by test_triton.py.

Shows that they are valid for the hardware and spill no registers; nothing is run.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "export" / "vllm")]

from sparsedeploy_vllm import triton_kernels as kernels  # noqa: E402

POINTERS = {
    "x_ptr": "*bf16",
    "values_ptr": "*bf16",
    "bias_ptr": "*bf16",
    "out_ptr": "*bf16",
    "mask_ptr": "*u8",
    "positions_ptr": "*u8",
    "offsets_ptr": "*i32",
}
TWO_EIGHT = {"FIELD": 6, "N": 2, "M": 8}


def compile_for_hopper(kernel: Any, constants: dict[str, int]) -> Any:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name not in constants},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2})


CASES = {
    "bitmask_vector": (kernels._bitmask_vector, {"BATCH": 1, "ROWS": 4, "BYTES": 64, "HAS_BIAS": 1}, False),
    "bitmask_tensor": (
        kernels._bitmask_tensor,
        {"BATCH": 16, "ROWS": 32, "BYTES": 8, "HAS_BIAS": 0, "WIDEN": 0},
        True,
    ),
    "nm_vector": (kernels._nm_vector, {"BATCH": 1, "ROWS": 4, "GROUPS": 128, "HAS_BIAS": 0, **TWO_EIGHT}, False),
    "nm_tensor": (
        kernels._nm_tensor,
        {"BATCH": 16, "ROWS": 32, "GROUPS": 8, "HAS_BIAS": 0, "WIDEN": 0, **TWO_EIGHT},
        True,
    ),
}

if __name__ == "__main__":
    for name, (kernel, constants, tensor_cores) in CASES.items():
        ptx = compile_for_hopper(kernel, constants).asm["ptx"]
        assert (re.search(r"\b(wg)?mma", ptx) is not None) == tensor_cores, name
        print("compiled", name)
