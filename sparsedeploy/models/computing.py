"""How a model is computed: in which type, and by which attention kernel. One rule for every command."""

from __future__ import annotations

import inspect
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
_COMPUTED = (torch.float64, torch.float32, *_NATIVE)
# A limit on attention scores before the softmax, by whatever name. Fused kernels do not apply it.
_SCORE_CAP = re.compile(r"attn\w*soft_?cap\w*|attention\w*soft_?cap\w*")


def compute_type(config: Any, device: torch.device | str, asked: torch.dtype | None) -> torch.dtype:
    """The type to compute in: the one asked for, else the checkpoint's own, or float32 where that is faster.

    Half types are slower than float32 on processors that cannot multiply in them; the stored weights stay as they are.

    Raises:
        UserError: the checkpoint's own is an integer or a float of 8 bits.
    """
    if asked is not None:
        return asked
    own: torch.dtype = config.dtype or getattr(config.get_text_config(), "dtype", None) or torch.float32
    if own not in _COMPUTED:
        name = str(own).removeprefix("torch.")
        raise UserError(
            f"config.json gives the type {name}, in which models cannot be computed", "Choose one: --dtype float32."
        )
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


def mask_later_tokens(model: Any) -> None:
    """Give a decoder of BERT's kind the causal mask that its own code leaves out.

    transformers 5 masks nothing but padding in BigBird, Megatron-BERT, RemBERT and RoFormer, whatever ``is_decoder``
    says; the versions before it masked later tokens, and such models are trained so.
    """
    base = getattr(model, "base_model", model)
    if not getattr(model.config, "is_decoder", False):
        return
    code = inspect.getsource(type(base).forward)
    if "create_bidirectional_mask" in code and "create_causal_mask" not in code:
        base.register_forward_pre_hook(_causal_mask, with_kwargs=True)


def _causal_mask(base: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a base model with a mask ``[sequences, 1, tokens, cached + tokens]``, unless they have one.

    Raises:
        UserError: block-sparse attention, which cannot be masked so.
    """
    tokens = args[0] if args else named.get("input_ids")
    entering = tokens if tokens is not None else named["inputs_embeds"]
    given, cache = named.get("attention_mask"), named.get("past_key_values")
    if given is not None and given.dim() == 4:
        return args, named
    config, (sequences, length) = base.config, entering.shape[:2]
    if getattr(config, "attention_type", "") == "block_sparse":
        limit = (5 + 2 * config.num_random_blocks) * config.block_size
        if length > limit:
            raise UserError(
                f"the block-sparse attention of {type(base).__name__} looks ahead beyond {limit} tokens",
                f'Use at most {limit} tokens, or set "attention_type": "original_full" in its config.json.',
            )
    before = cache.get_seq_length() if cache is not None else 0
    at = torch.arange(before + length, device=entering.device)
    seen = (at[None, :] <= at[before:, None])[None, None]
    if given is not None:
        seen = seen & given[:, None, None, :].bool()
    mask = torch.zeros(seen.shape, dtype=base.dtype, device=entering.device)
    mask = mask.masked_fill(~seen, torch.finfo(base.dtype).min)
    return args, {**named, "attention_mask": mask.expand(sequences, -1, -1, -1)}


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
