"""What an interrupted recovery goes on from: named sets of tensors and plain values, each whole or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sparsedeploy.checkpoint.journal import ResumeError
from sparsedeploy.folders import new_folder, write_json
from sparsedeploy.reading import read_object

_REQUEST = "request.json"
_TENSORS = "state.safetensors"
_VALUES = "values.json"
_START_OVER = "Run without --resume to start over."


class RunState:
    """A hidden folder beside the output.

    Args:
        output: the folder that the run will write.
        request: everything that decides the result, as plain data; it must be the same to resume.
        resume: go on with what is there; otherwise what is there is dropped.

    Raises:
        UserError: a changed request, naming what changed; the interrupted run is kept.
    """

    def __init__(self, output: Path, request: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = output.parent / f".{output.name}.recovery"
        now = json.loads(json.dumps(dict(request)))
        if resume and (self.folder / _REQUEST).is_file():
            before = read_object(self.folder / _REQUEST, fix=_START_OVER)
            if changed := [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]:
                raise ResumeError(
                    f"cannot resume: {', '.join(changed)} changed since the run that was interrupted "
                    f"({changed[0]} was {before.get(changed[0])}, is {now.get(changed[0])})",
                    "Run with the same options, or without --resume to start over.",
                )
            return
        self.remove()
        write_json(self.folder / _REQUEST, now)

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Replace a set; after a kill the one before or the new one is there, whole."""
        with new_folder(self.folder / name, overwrite=True) as staging:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, staging / _TENSORS)
            write_json(staging / _VALUES, dict(values))

    def load(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """A set, its tensors on the CPU; None when it was never saved."""
        folder = self.folder / name
        if not folder.is_dir():
            return None
        return load_file(folder / _TENSORS), read_object(folder / _VALUES, fix=_START_OVER)

    def drop(self, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def remove(self) -> None:
        """The run is over: nothing is left to go on from."""
        shutil.rmtree(self.folder, ignore_errors=True)
