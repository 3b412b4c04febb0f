"""Where the activations of the calibration text are kept, and how many sequences go through a layer at once."""

from __future__ import annotations

import tempfile
from typing import Literal

import psutil
import torch

from sparsedeploy import progress

Keep = Literal["auto", "memory", "disk"]
# The share of what is free that a buffer or a batch may take: the layer, its statistics and the solver need the rest.
_SHARE = 0.5
# Tokens per layer call from which products run at full speed.
_MIN_TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 16384}
# Activations of a layer that are alive at once, in units of its widest one; a generous guess.
_LIVE_ACTIVATION_FACTOR = 8


def free_bytes(device: torch.device) -> int:
    """Bytes that a new allocation on the device may hope for."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def new_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, keep: Keep = "auto") -> torch.Tensor:
    """An uninitialised buffer: on the device if it fits well, else in main memory, else in a memory-mapped file.

    Args:
        keep: ``memory`` and ``disk`` decide it; ``disk`` is an unnamed file in the folder for temporary files.
    """
    needed = torch.Size(shape).numel() * dtype.itemsize
    if keep != "disk":
        if device.type == "cuda" and needed <= _SHARE * free_bytes(device):
            return torch.empty(shape, dtype=dtype, device=device)
        if keep == "memory" or needed <= _SHARE * free_bytes(torch.device("cpu")):
            return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
        progress.note(f"activations of {needed / 1e9:.1f} GB are kept in a temporary file")
    with tempfile.NamedTemporaryFile(prefix="sparsedeploy-activations-") as file:
        # The mapping outlives the name: the space is given back with the tensor, also after a kill.
        flat = torch.from_file(file.name, shared=True, size=torch.Size(shape).numel(), dtype=dtype)
    return flat.reshape(shape)


def choose_batch_size(sequences: int, length: int, widest: int, device: torch.device) -> int:
    """Sequences per layer call: enough tokens for full speed, within the free memory. It does not change results.

    Args:
        widest: features of the layer's widest activation.
    """
    enough = max(1, _MIN_TOKENS_PER_BATCH[device.type] // length)
    fitting = int(_SHARE * free_bytes(device) // (_LIVE_ACTIVATION_FACTOR * 4 * length * widest))
    return max(1, min(enough, fitting, sequences))
