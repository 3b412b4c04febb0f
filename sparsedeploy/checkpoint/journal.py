"""The journal of a run: which layers of a checkpoint in the making are finished, so that a killed run can go on.

The folder in the making is a hidden sibling of the output. A layer's line is written only after its tensors are safe on
disk, so whatever the journal names is whole; whatever it does not name is simply done again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsedeploy.errors import UserError
from sparsedeploy.folders import DiskError, check_writable, disk_error, publish
from sparsedeploy.reading import Fields, parse_object, read_bytes

FILE = "journal.jsonl"


@dataclass
class Journal:
    """The state of a run.

    Attributes:
        folder: the folder in the making.
        plan: the plan as plain data, once it is known.
        losses: the pruner's losses of the finished modules.
        finished: the number of finished layers.
    """

    folder: Path
    plan: dict[str, Any] | None = None
    losses: dict[str, float] = field(default_factory=dict)
    finished: int = 0

    def record_plan(self, plan: dict[str, Any]) -> None:
        """Keep the plan; the folder's files have been created."""
        self._append({"plan": plan})
        self.plan = plan

    def record_layer(self, index: int, losses: Mapping[str, float]) -> None:
        """Keep that a layer is finished; its tensors are safe on disk."""
        self._append({"layer": index, "losses": dict(losses)})
        self.finished = index + 1
        self.losses.update(losses)

    def _append(self, entry: dict[str, Any]) -> None:
        with open(self.folder / FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def journalled_folder(output: Path, request: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Iterator[Journal]:
    """Yield the journal of a folder in the making; on success it becomes ``output``.

    After a kill, or on a disk that fills up, the finished layers stay, and a run with ``resume`` goes on from there.
    After bad input nothing stays.

    Args:
        request: everything that decides the result, as flat plain data; it must be the same to resume.

    Raises:
        UserError: an output that exists, a disk that is full or read-only, or a changed request, naming what changed.
    """
    check_writable(output, overwrite)
    folder = output.parent / f".{output.name}.partial"
    journal: Journal | None = None
    try:
        journal = _resumed(folder, request) if resume else None
        if journal is None:
            journal = _fresh(folder, request)
        yield journal
        (folder / FILE).unlink()
        publish(folder, output)
    except ResumeError:
        raise
    except (DiskError, OSError) as error:
        reason = (error.message, error.fix) if isinstance(error, DiskError) else disk_error(error)
        if reason is None:
            raise
        if journal is not None and journal.finished:
            fix = f"Mend that, then run the command again with --resume: {journal.finished} layers are kept."
            raise DiskError(reason[0], fix) from error
        shutil.rmtree(folder, ignore_errors=True)
        raise DiskError(*reason) from error
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _fresh(folder: Path, request: Mapping[str, Any]) -> Journal:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    journal = Journal(folder)
    journal._append({"request": dict(request)})
    return journal


def _resumed(folder: Path, request: Mapping[str, Any]) -> Journal | None:
    """The journal of an interrupted run; None when there is none to go on with."""
    path = folder / FILE
    if not path.exists():
        return None
    fix = "Run without --resume to start over."
    # Bytes after the last newline are a line that the kill cut short.
    lines = read_bytes(path, fix=fix).split(b"\n")
    entries = [
        Fields(parse_object(line, f"{path} line {number}", fix=fix), f"{path} line {number}", fix)
        for number, line in enumerate(lines[:-1], 1)
    ]
    if not entries:
        return None
    before = entries[0].mapping("request")
    now = json.loads(json.dumps(dict(request)))
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        key = changed[0]
        raise ResumeError(
            f"cannot resume: {', '.join(changed)} changed since the run that was interrupted "
            f"({key} was {before.get(key)}, is {now.get(key)})",
            "Run with the same options, or without --resume to start over.",
        )
    journal = Journal(folder)
    for entry in entries[1:]:
        if "plan" in entry:
            journal.plan = entry.mapping("plan")
        else:
            journal.finished = entry.integer("layer") + 1
            journal.losses.update(entry.mapping("losses"))
    _cut(path, b"\n".join(lines[:-1]) + b"\n")
    return journal


class ResumeError(UserError):
    """The interrupted run is kept: it may still be resumed with its own options."""


def _cut(path: Path, whole: bytes) -> None:
    if path.stat().st_size != len(whole):
        os.truncate(path, len(whole))
