"""Put the codes and scales of a quantised checkpoint into a GGUF file, in place of llama.cpp's own rounding.

llama.cpp's converter renames tensors and, for some families, reorders their rows, so rows are found by what they hold.
Block layouts are ggml's: Q8_0 is a float16 scale and 32 int8 codes, Q4_0 a float16 scale and 32 codes of 4 bits, plus
8, element i of the first half in the low and of the second in the high half of byte i.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparsedeploy.grid import Grid, codes_of

GROUP = 32
TYPES = {8: "Q8_0", 4: "Q4_0"}
Rows = dict[bytes, tuple[str, int]]


@dataclass(frozen=True)
class Layout:
    """Where a tensor ``[..., rows, columns]`` lies in a GGUF file; ``kind`` is ggml's name of its type."""

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    size: int


def layouts(described: Iterable[Mapping[str, Any]]) -> dict[str, Layout]:
    """By name, from what the tool prints."""
    return {
        each["name"]: Layout(each["name"], tuple(each["shape"]), each["kind"], each["start"], each["size"])
        for each in described
    }


def place_codes(
    exact: Path,
    final: Path,
    before: Mapping[str, Layout],
    after: Mapping[str, Layout],
    weights: Mapping[str, torch.Tensor],
    scales: Mapping[str, torch.Tensor],
    grid: Grid,
) -> int:
    """Write the checkpoint's codes over those of the final file.

    Args:
        exact: the same model as float32, of layout ``before``.
        final: the file to change, of layout ``after``.
        weights, scales: by module, as the checkpoint has them.

    Returns:
        How many tensors were written; others keep llama.cpp's rounding.
    """
    known: Rows = {}
    for name, weight in weights.items():
        for row, values in enumerate(weight.float().numpy()):
            known.setdefault(_digest(values), (name, row))
    codes: dict[str, npt.NDArray[np.int8]] = {}
    written = 0
    for name, tensor in after.items():
        source = before.get(name)
        if source is None or tensor.kind != TYPES[grid.bits] or source.kind != "F32":
            continue
        rows = np.memmap(exact, np.float32, "r", source.start, (source.size // 4 // source.shape[-1], source.shape[-1]))
        found = [known.get(_digest(row)) for row in rows]
        places = [place for place in found if place is not None]
        if len(places) != len(found):
            continue
        for module in {place[0] for place in places} - codes.keys():
            codes[module] = codes_of(weights[module], scales[module], grid).numpy()
        width = tensor.size // len(places)
        blocks = np.memmap(final, np.uint8, "r+", tensor.start, (len(places), width))
        for index, (module, row) in enumerate(places):
            blocks[index] = _blocks(codes[module][row], scales[module][row].numpy(), grid.bits)
        blocks.flush()
        written += 1
    return written


def _digest(row: npt.NDArray[np.float32]) -> bytes:
    # Adding 0 makes of -0 the 0 that other programs may make of it.
    return blake2b((row + np.float32(0)).tobytes(), digest_size=16).digest()


def _blocks(codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float16], bits: int) -> npt.NDArray[np.uint8]:
    """One row as ggml stores it."""
    groups = codes.reshape(-1, GROUP)
    values: npt.NDArray[np.uint8] = groups.view(np.uint8)
    if bits == 4:
        shifted = (groups + 8).astype(np.uint8)
        values = np.bitwise_or(shifted[:, : GROUP // 2], np.left_shift(shifted[:, GROUP // 2 :], 4))
    return np.concatenate([scales.reshape(-1, 1).view(np.uint8), values], axis=1).reshape(-1)
