"""Several processes on one job (``torchrun``): who this process is, and how the processes share their results."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from sparsedeploy import progress
from sparsedeploy.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and the command line asks for the number of processes at once
    import torch

T = TypeVar("T")
# One process may work for hours (a large solve, a search) while the others wait for its result.
_TIMEOUT = datetime.timedelta(hours=12)
# All processes start together; one that is not there by now does not come.
_START_TIMEOUT = datetime.timedelta(minutes=5)


@dataclass(frozen=True)
class Processes:
    """This process among ``count``; a process alone is rank 0 of 1, and every operation is then free."""

    index: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes the files and speaks to the user."""
        return self.index == 0

    def shard(self, tokens: torch.Tensor) -> torch.Tensor:
        """This process's part of the calibration sequences.

        Raises:
            UserError: fewer sequences than processes.
        """
        if len(tokens) < self.count:
            raise UserError(
                f"{len(tokens)} calibration sequences cannot be split over {self.count} processes",
                "Use more --samples or fewer processes.",
            )
        return tokens.tensor_split(self.count)[self.index]

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by its sum over all processes."""
        if self.count > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)

    def broadcast(self, tensor: torch.Tensor, owner: int) -> None:
        """Replace a tensor by the owner's."""
        if self.count > 1:
            import torch.distributed as dist

            dist.broadcast(tensor, owner)

    def broadcast_object(self, value: T, owner: int = 0) -> T:
        """The owner's value, plain data, for everyone."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, owner)
        return box[0]


SINGLE_PROCESS = Processes()


def environment_processes() -> Processes:
    """This process among those that a launcher such as ``torchrun`` started, from its environment variables.

    Raises:
        UserError: variables that are not numbers, do not fit each other, or are incomplete.
    """
    count = _number("WORLD_SIZE", 1)
    index = _number("RANK", 0)
    if count < 1 or not 0 <= index < count:
        raise UserError(f"RANK is {index} of WORLD_SIZE {count}", _LAUNCH)
    if count > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(f"WORLD_SIZE is {count} and {name} is not set", _LAUNCH)
        _number("MASTER_PORT", 0)
        _number("LOCAL_RANK", 0)
    return Processes(index, count)


def refuse_several(work: str) -> None:
    """Refuse to do by several processes what they cannot share.

    Raises:
        UserError: a launcher started more than one.
    """
    count = environment_processes().count
    if count > 1:
        raise UserError(
            f"{count} processes cannot share {work}: prune without --recover, and recover with a method that trains a "
            "pruned checkpoint, are split over processes",
            "Run it without torchrun.",
        )


def local_device(device: torch.device) -> torch.device:
    """Under ``torchrun``, the GPU of this process, where a GPU is asked for without a number."""
    import torch

    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", _number("LOCAL_RANK", 0))
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[Processes]:
    """Join the other processes that ``torchrun`` started, if it did; progress is then shown by the first one only.

    Raises:
        UserError: wrong environment variables, or the other processes do not come.
    """
    found = environment_processes()
    if found.count == 1:
        yield SINGLE_PROCESS
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", found.index, found.count, timeout=_START_TIMEOUT)))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("sparsedeploy", store),
            rank=found.index,
            world_size=found.count,
            timeout=_TIMEOUT,
        )
    except (RuntimeError, ValueError, OSError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the {found.count} processes do not find each other at {place}", _LAUNCH) from error
    if not found.main:
        progress.show(False)
    try:
        yield found
    finally:
        dist.destroy_process_group()


_LAUNCH = "Start all processes with torchrun, or unset RANK and WORLD_SIZE."


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.strip().isascii() or not text.strip().isdigit():
        raise UserError(f"the environment variable {name} is {text!r}, which is not a number", _LAUNCH)
    return int(text)
