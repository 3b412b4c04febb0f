"""Several processes on one job (``torchrun``): who this process is, and how the processes share their results."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from sparsedeploy import progress
from sparsedeploy.errors import UserError

T = TypeVar("T")
# One process may work for hours (a large solve, an export) while the others wait for its result.
_TIMEOUT = datetime.timedelta(hours=12)


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
            dist.all_reduce(tensor)

    def broadcast(self, tensor: torch.Tensor, owner: int) -> None:
        """Replace a tensor by the owner's."""
        if self.count > 1:
            dist.broadcast(tensor, owner)

    def broadcast_object(self, value: T, owner: int = 0) -> T:
        """The owner's value, plain data, for everyone."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, owner)
        return box[0]


SINGLE_PROCESS = Processes()


def local_device(device: torch.device) -> torch.device:
    """Under ``torchrun``, the GPU of this process, where a GPU is asked for without a number."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[Processes]:
    """Join the other processes that ``torchrun`` started, if it did; progress is then shown by the first one only."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or dist.is_initialized():
        yield SINGLE_PROCESS if count == 1 else Processes(dist.get_rank(), dist.get_world_size())
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    processes = Processes(dist.get_rank(), dist.get_world_size())
    if not processes.main:
        progress.show(False)
    try:
        yield processes
    finally:
        dist.destroy_process_group()
