"""What an interrupted recovery resumes from: named sets of tensors and plain values, each whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparsedeploy.checkpoint.journal import START_OVER, ResumeError, check_same
from sparsedeploy.errors import UserError, add_hint
from sparsedeploy.folders import DiskError, as_disk_error, discard, sync, write_json
from sparsedeploy.reading import parse_object, read_object

_REQUEST = "request.json"
_VALUES = "values"  # in the metadata of a set's file


class RunState:
    """A hidden folder beside the output, made when the first set is saved. Each set is one file, replaced in one step.

    Args:
        output: the folder that the run will write, which the run has claimed.
        request: everything that decides the result, as plain data; it must be the same to resume.
        resume: continue from what is there; otherwise it is dropped.
        writes: False for a process that only reads what the first one of several writes.

    Raises:
        UserError: a changed request, naming what changed; the interrupted run is kept.
    """

    def __init__(self, output: Path, request: Mapping[str, Any], *, resume: bool, writes: bool = True) -> None:
        self.output = output
        self.folder = output.with_name(f".{output.name}.recovery")
        self._request = dict(request)
        self._writes = writes
        if not writes:
            return
        if resume and (self.folder / _REQUEST).is_file():
            check_same(read_object(self.folder / _REQUEST, fix=START_OVER), request)
            return
        self.remove()

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Replace a set; after a kill the one before or the new one is there, whole.

        Raises:
            UserError: the disk is full or not writable; what was saved before is kept.
        """
        if not self._writes:
            return
        temporary = self.folder / f"{name}.tmp"
        try:
            if not (self.folder / _REQUEST).is_file():
                write_json(self.folder / _REQUEST, self._request)
            plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(plain, temporary, metadata={_VALUES: json.dumps(dict(values))})
            sync(temporary)
            os.replace(temporary, self._file(name))
            sync(self.folder)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if not any(self.folder.glob("*.safetensors")):
                self.remove()
            if (found := as_disk_error(error, self.output)) is not None:
                raise found from error
            raise

    def holds(self, name: str) -> bool:
        """Whether a set was saved."""
        return self._file(name).is_file()

    def load(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """A set, its tensors on the CPU; None when it was never saved.

        Raises:
            UserError: its file is damaged.
        """
        path = self._file(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
                return tensors, parse_object((file.metadata() or {}).get(_VALUES, ""), str(path), fix=START_OVER)
        except (SafetensorError, OSError) as error:
            raise ResumeError(f"{path} is damaged", START_OVER) from error

    def drop(self, name: str) -> None:
        if self._writes:
            self._file(name).unlink(missing_ok=True)

    def remove(self) -> None:
        """The run is over: nothing is left to resume."""
        if self._writes:
            discard(self.folder, self.output)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Have every failure inside say that the run can be resumed, where it can."""
        try:
            yield
        except BaseException as error:
            if self.folder.is_dir() and (isinstance(error, DiskError) or not isinstance(error, UserError)):
                add_hint(error, "What was trained is kept: run the same command with --resume.")
            raise

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
