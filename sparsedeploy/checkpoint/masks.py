"""Masks on disk: one bit per weight in a safetensors file that no model loader picks up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from sparsedeploy.errors import UserError

FILE = "sparsity.masks"


def pack_mask(mask: torch.Tensor) -> np.ndarray:
    """uint8 ``[rows, ceil(columns / 8)]``: True (kept) is 1, the first column in the highest bit."""
    return np.packbits(mask.cpu().numpy(), axis=1)


def load_masks(path: Path, columns: dict[str, int]) -> dict[str, torch.Tensor]:
    """Read masks back as bool ``[rows, columns]``; ``columns`` gives each module's width.

    Raises:
        UserError: the file is missing or unreadable, or lacks a module.
    """
    try:
        packed = load_file(path)
    except Exception as error:
        raise UserError(f"the masks in {path} cannot be read ({error})", "Prune the model again.") from error
    if missing := [name for name in columns if name not in packed]:
        raise UserError(f"{path} lacks the mask of {missing[0]}", "Prune the model again.")
    return {
        name: torch.from_numpy(np.unpackbits(packed[name], axis=1, count=width).astype(bool))
        for name, width in columns.items()
    }
