"""How a model is computed: in which type, and by which attention kernel. One rule for every command."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sparsedeploy import progress
from sparsedeploy.errors import UserError

# Processor flags that multiply in the type; without one of them torch emulates it, slower than float32.
_NATIVE = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "avx10_2", "bf16", "svebf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "avx10_2", "fphp", "asimdhp"},
}
# A limit on attention scores before the softmax, by whatever name. Fused kernels do not apply it.
_SCORE_CAP = re.compile(r"attn\w*soft_?cap\w*|attention\w*soft_?cap\w*")


def compute_type(config: Any, device: torch.device | str, asked: torch.dtype | None) -> torch.dtype:
    """The type to compute in: the one asked for, else the checkpoint's own, or float32 where that is faster.

    Half types are slower than float32 on processors that cannot multiply in them; the stored weights stay as they are.
    """
    if asked is not None:
        return asked
    own: torch.dtype = config.dtype or getattr(config.get_text_config(), "dtype", None) or torch.float32
    flags = processor_flags()
    if torch.device(device).type == "cpu" and own in _NATIVE and flags and not flags & _NATIVE[own]:
        name = str(own).removeprefix("torch.")
        progress.note(f"computing in float32: this processor has no {name} products (--dtype {name} to use it anyway)")
        return torch.float32
    return own


def attention(config: Any) -> str | None:
    """``eager`` where a fused kernel would compute another function than the model's; else None, transformers' choice.

    Models with sinks are left to transformers, which knows that no fused kernel has them.
    """
    parts = [config, config.get_text_config()]
    capped = any(_SCORE_CAP.fullmatch(name) and value for part in parts for name, value in vars(part).items())
    return "eager" if capped else None


@contextmanager
def model_errors(model: object) -> Iterator[None]:
    """Around a forward pass on inputs of a new kind: what the model's own code raises there is said of the model.

    Raises:
        UserError: naming the error; one of memory is left as it is.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{type(model).__name__} does not run on a text ({type(error).__name__}: {reason})",
            "Check its config.json: transformers itself fails here, too.",
        ) from error


@cache
def processor_flags() -> frozenset[str]:
    """Instruction-set flags of the processor; empty where the system does not report them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def resolve_device(name: str) -> torch.device:
    """``auto`` picks CUDA when there is one.

    Raises:
        UserError: CUDA is asked for and absent, or the name is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|cuda(:\d{1,4})?", name) is None:
        raise UserError(f"unknown device '{name}'", "Use auto, cpu, cuda or cuda:N.")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"device '{name}' is not on this machine", "Use --device cpu.")
    return device
