"""Masks on disk: one bit per weight in a safetensors file that no model loader picks up."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from sparsedeploy.errors import UserError
from sparsedeploy.masks import unpack_bits

FILE = "sparsity.masks"
AGAIN = "Prune the model again."
# In the file's metadata. Files without it were written by versions before 0.2, the first column in the highest bit.
BIT_ORDER = {"bit_order": "little"}
_REVERSED = np.array([int(f"{value:08b}"[::-1], 2) for value in range(256)], dtype=np.uint8)


def read_modules(path: Path, names: Collection[str], what: str) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """The tensors of modules from a file beside the weights, and the file's metadata.

    Args:
        what: a module has in that file, for messages.

    Raises:
        UserError: the file is missing or unreadable, or lacks a module.
    """
    try:
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
            found = {name: file.get_tensor(name) for name in names if name in held}
            metadata = file.metadata() or {}
    except Exception as error:
        raise UserError(f"the {what}s in {path} cannot be read ({error})", AGAIN) from error
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{path} lacks the {what} of {missing[0]}", AGAIN)
    return found, metadata


def load_masks(path: Path, columns: dict[str, int]) -> dict[str, torch.Tensor]:
    """Read masks back as bool ``[rows, columns]``; ``columns`` gives each module's width.

    Raises:
        UserError: the file is missing or unreadable, or lacks a module.
    """
    packed, metadata = read_modules(path, columns, "mask")
    little = metadata.get("bit_order") == BIT_ORDER["bit_order"]
    if not little:
        reversed_bits = torch.from_numpy(_REVERSED)
        packed = {name: reversed_bits[packed[name].int()] for name in columns}
    return {name: unpack_bits(packed[name], width) for name, width in columns.items()}
