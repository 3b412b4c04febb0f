"""The scales of a quantised checkpoint, one float16 for every group of columns, in a file that no loader picks up.

The weights themselves are stored as floating-point numbers, a code times its scale, so that every loader can use them;
:func:`~sparsedeploy.grid.codes_of` finds the codes again.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sparsedeploy.checkpoint.masks import AGAIN, read_modules
from sparsedeploy.errors import UserError
from sparsedeploy.grid import Grid

FILE = "sparsity.scales"


def load_scales(path: Path, shapes: dict[str, tuple[int, int]], grid: Grid) -> dict[str, torch.Tensor]:
    """Read scales back as float16 ``[rows, groups]``, by module.

    Args:
        shapes: each module's rows and columns.

    Raises:
        UserError: the file is missing or unreadable, lacks a module, has another shape, or a scale that is not finite
            or zero.
    """
    found, _ = read_modules(path, shapes, "scale")
    for name, (rows, columns) in shapes.items():
        scales = found[name]
        if scales.dtype != torch.float16 or scales.shape != (rows, grid.groups(columns)):
            raise UserError(f"{path}: the scales of {name} are {scales.dtype} {list(scales.shape)}", AGAIN)
        if not bool((torch.isfinite(scales) & (scales != 0)).all()):
            raise UserError(f"{path}: a scale of {name} is zero, NaN or infinite", AGAIN)
    return found
