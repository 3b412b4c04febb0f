"""The journal of a run: which layers of a checkpoint in the making are finished, so that a killed run can be resumed.

The folder in the making is a hidden sibling of the output. The plan's line is written only after all files of the
folder are safe on disk, a layer's line only after its tensors are, so whatever the journal names is whole; whatever it
does not name is simply done again. Each line carries its own hash. The journal goes last, when the folder has its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsedeploy.errors import UserError, add_hint
from sparsedeploy.folders import JOURNAL, DiskError, as_disk_error, claim, discard, partial, publish, sync
from sparsedeploy.reading import Fields, parse_object, read_bytes

START_OVER = "Run without --resume to start over."


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
        """Keep the plan; the folder's files have been created and synced."""
        self._append({"plan": plan})
        self.plan = plan

    def record_layer(self, index: int, losses: Mapping[str, float]) -> None:
        """Keep that a layer is finished; its tensors are safe on disk."""
        self._append({"layer": index, "losses": dict(losses)})
        self.finished = index + 1
        self.losses.update(losses)

    def _append(self, entry: dict[str, Any]) -> None:
        with open(self.folder / JOURNAL, "a", encoding="utf-8") as file:
            file.write(json.dumps({**entry, "sha256": _digest(entry)}) + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def journalled_folder(output: Path, request: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Iterator[Journal]:
    """Yield the journal of a folder in the making; on success it becomes ``output``.

    After a kill, any failure but bad input, or on a disk that fills up, what is finished stays, and a run with
    ``resume`` continues from there; the error says so. After bad input nothing new stays.

    Args:
        request: everything that decides the result, as flat plain data; it must be the same to resume.

    Raises:
        UserError: an output that exists, a disk that is full or read-only, or a changed request, naming what changed.
    """
    with claim(output, overwrite=overwrite, resume=resume):
        folder = partial(output)
        journal: Journal | None = None
        resumed = False
        try:
            journal = _resumed(folder, request) if resume else None
            resumed = journal is not None
            if journal is None:
                discard(folder, output)
                journal = _fresh(folder, request)
            yield journal
            publish(folder, output)
            # Until here a killed run can still be resumed.
            (output / JOURNAL).unlink()
            sync(output)
        except ResumeError:
            raise
        except BaseException as error:
            disk = error if isinstance(error, DiskError) else as_disk_error(error, output)
            if disk is None and isinstance(error, UserError) and resumed:
                raise  # what was done before stays, whatever is wrong with it or with this run
            if journal is None or journal.plan is None or (disk is None and isinstance(error, UserError)):
                shutil.rmtree(folder, ignore_errors=True)
            else:
                kept = f"the plan and {journal.finished} finished layer{'s' * (journal.finished != 1)} are kept"
                if disk is not None:
                    raise DiskError(
                        disk.message, f"Fix that, then run the command again with --resume: {kept}."
                    ) from error
                add_hint(error, f"{kept[0].upper()}{kept[1:]}: run the same command with --resume.")
            if disk is not None:
                raise disk from error
            raise


def _fresh(folder: Path, request: Mapping[str, Any]) -> Journal:
    folder.mkdir(parents=True)
    journal = Journal(folder)
    journal._append({"request": dict(request)})
    sync(folder)
    sync(folder.parent)
    return journal


def _resumed(folder: Path, request: Mapping[str, Any]) -> Journal | None:
    """The journal of an interrupted run; None when there is none to resume.

    Raises:
        UserError: a changed request, or a journal that cannot be read; the interrupted run is kept.
    """
    path = folder / JOURNAL
    if not path.exists():
        return None
    journal = Journal(folder)
    try:
        # Bytes after the last newline are a line that the kill cut short.
        lines = read_bytes(path, fix=START_OVER).split(b"\n")
        entries = [_entry(line, f"{path} line {number}") for number, line in enumerate(lines[:-1], 1)]
        if not entries:
            return None
        before = entries[0].mapping("request")
        for entry in entries[1:]:
            if journal.plan is None:
                journal.plan = entry.mapping("plan")
            elif entry.integer("layer") == journal.finished:
                journal.finished += 1
                journal.losses.update(entry.mapping("losses"))
            else:
                raise UserError(f"{entry.where} is not about layer {journal.finished}", START_OVER)
    except UserError as error:
        raise ResumeError(error.message, error.fix) from error
    check_same(before, request)
    whole = b"\n".join(lines[:-1]) + b"\n"
    if path.stat().st_size != len(whole):
        os.truncate(path, len(whole))
    return journal


def _entry(line: bytes, where: str) -> Fields:
    """One line of a journal, as it was written.

    Raises:
        UserError: not a line of a journal, or not the one that was written.
    """
    values = parse_object(line, where, fix=START_OVER)
    digest = Fields(values, where, START_OVER).text("sha256")
    del values["sha256"]
    if digest != _digest(values):
        raise UserError(f"{where} is damaged", START_OVER)
    return Fields(values, where, START_OVER)


def _digest(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry).encode()).hexdigest()


def check_same(before: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """Refuse to resume a run with another request.

    Raises:
        UserError: naming what changed; the interrupted run is kept.
    """
    now = json.loads(json.dumps(dict(request)))
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        key, was, now_is = changed[0], before.get(changed[0]), now.get(changed[0])
        while isinstance(was, dict) and isinstance(now_is, dict):  # the first option in it that differs
            key = next(one for one in sorted({*was, *now_is}) if was.get(one) != now_is.get(one))
            was, now_is = was.get(key), now_is.get(key)
        raise ResumeError(
            f"cannot resume: {', '.join(changed)} changed since the run that was interrupted "
            f"({key} was {was}, is {now_is})",
            "Run with the same options, or without --resume to start over.",
        )


class ResumeError(UserError):
    """The interrupted run is kept: it may still be resumed with its own options."""
