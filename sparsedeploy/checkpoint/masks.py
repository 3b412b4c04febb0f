"""Masks on disk: one bit per weight in a safetensors file that no model loader picks up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from sparsedeploy.errors import UserError
from sparsedeploy.masks import unpack_bits

FILE = "sparsity.masks"
# In the file's metadata. Files without it were written by versions before 0.2, the first column in the highest bit.
BIT_ORDER = {"bit_order": "little"}
_REVERSED = np.array([int(f"{value:08b}"[::-1], 2) for value in range(256)], dtype=np.uint8)


def load_masks(path: Path, columns: dict[str, int]) -> dict[str, torch.Tensor]:
    """Read masks back as bool ``[rows, columns]``; ``columns`` gives each module's width.

    Raises:
        UserError: the file is missing or unreadable, or lacks a module.
    """
    try:
        with safe_open(path, framework="pt") as file:
            little = (file.metadata() or {}).get("bit_order") == BIT_ORDER["bit_order"]
            held = set(file.keys())
            packed = {name: file.get_tensor(name) for name in columns if name in held}
    except Exception as error:
        raise UserError(f"the masks in {path} cannot be read ({error})", "Prune the model again.") from error
    if missing := [name for name in columns if name not in packed]:
        raise UserError(f"{path} lacks the mask of {missing[0]}", "Prune the model again.")
    if not little:
        reversed_bits = torch.from_numpy(_REVERSED)
        packed = {name: reversed_bits[packed[name].int()] for name in columns}
    return {name: unpack_bits(packed[name], width) for name, width in columns.items()}
