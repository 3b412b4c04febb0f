"""The scales of a quantised checkpoint, one float16 for every group of columns, in a file that no loader picks up.

The weights themselves are stored as floating-point numbers, a code times its scale, so that every loader can use them;
:func:`~sparsedeploy.grid.codes_of` finds the codes again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from sparsedeploy.errors import UserError
from sparsedeploy.grid import Grid

FILE = "sparsity.scales"
_AGAIN = "Prune the model again."


def load_scales(path: Path, shapes: dict[str, tuple[int, int]], grid: Grid) -> dict[str, torch.Tensor]:
    """Read scales back as float16 ``[rows, groups]``, by module.

    Args:
        shapes: each module's rows and columns.

    Raises:
        UserError: the file is missing or unreadable, lacks a module, has another shape, or a scale that is not finite
            or zero.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:
        raise UserError(f"the scales in {path} cannot be read ({error})", _AGAIN) from error
    for name, (rows, columns) in shapes.items():
        if name not in found:
            raise UserError(f"{path} lacks the scales of {name}", _AGAIN)
        scales = found[name]
        if scales.dtype != torch.float16 or scales.shape != (rows, grid.groups(columns)):
            raise UserError(f"{path}: the scales of {name} are {scales.dtype} {list(scales.shape)}", _AGAIN)
        if not bool((torch.isfinite(scales) & (scales != 0)).all()):
            raise UserError(f"{path}: a scale of {name} is zero, NaN or infinite", _AGAIN)
    return {name: found[name] for name in shapes}
