"""What ``deploy`` can aim at on this machine, and how long the steps may take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sparsedeploy.errors import UserError
from sparsedeploy.machine import this_machine
from sparsedeploy.models.structure import find_decoder_stack
from sparsedeploy.options import one_of
from sparsedeploy.runtimes.environments import status
from sparsedeploy.runtimes.pythons import find_python
from sparsedeploy.runtimes.specification import load_runtime
from sparsedeploy.workflows.aims import AIMS, CPU, Aim

# In the order in which `cpu` takes them; those that gain nothing from zeros are not among them.
_ON_CPU = ("llamacpp", "deepsparse")


@dataclass(frozen=True)
class Step:
    """A part of the work.

    Attributes:
        seconds: an estimate; None where there is none.
        done: by an earlier run.
    """

    name: str
    what: str
    seconds: float | None
    done: bool = False


def choose_aim(name: str) -> Aim:
    """The target by name; for ``cpu`` the first that is installed, or else that can be.

    Raises:
        UserError: an unknown target, or one that this machine cannot run, naming those that it can.
    """
    if name == CPU:
        able = [each for each in _ON_CPU if why_not(each) is None]
        if not able:
            reasons = "; ".join(str(why_not(each)) for each in _ON_CPU)
            raise UserError(f"no sparse runtime for CPUs runs here ({reasons})", _able(tuple(AIMS)))
        return AIMS[next((each for each in able if status(each).state == "installed"), able[0])]
    if name not in AIMS:
        raise UserError(f"unknown target '{name}'", f"Use {one_of([CPU, *AIMS])}.")
    if (reason := why_not(name)) is not None:
        raise UserError(f"this machine cannot run {name}: {reason}", _able(tuple(AIMS)))
    return AIMS[name]


def why_not(name: str) -> str | None:
    """Why a runtime neither is nor can be installed here; None where it can."""
    runtime = load_runtime(name)
    reason = runtime.why_not_here(this_machine())
    if reason is not None or status(name).state == "installed":
        return reason
    if (missing := runtime.missing_tool()) is not None:
        return f"{runtime.title} is built on the machine, which lacks {missing}"
    try:
        find_python(runtime)
    except UserError as error:
        return error.message
    return None


def _able(names: Sequence[str]) -> str:
    able = [each for each in names if why_not(each) is None]
    return f"It can run {one_of(able)}: --for {able[0]}." if able else "Use another machine."


@dataclass(frozen=True)
class Work:
    """Sizes that the time of the steps follows from.

    Attributes:
        weights: of the decoder's linears; ``others`` of everything else.
        squares: sum over the linears of columns squared; ``solves`` of columns cubed and of rows times columns squared.
        calibration, held_out: tokens.
    """

    weights: int
    others: int
    squares: float
    solves: float
    calibration: int
    held_out: int

    @staticmethod
    def of(model: nn.Module, calibration: int, held_out: int) -> Work:
        """From a model, which may be without weights."""
        linears = find_decoder_stack(model).all_linears().values()
        weights = sum(one.out_features * one.in_features for one in linears)
        return Work(
            weights,
            sum(each.numel() for each in model.parameters()) - weights,
            sum(float(one.in_features) ** 2 for one in linears),
            sum(float(one.in_features) ** 3 + float(one.out_features) * one.in_features**2 for one in linears),
            calibration,
            held_out,
        )

    def trial_seconds(self, method: str, speed: float) -> float:
        """A rough time of one pruning and its perplexity.

        Args:
            speed: floating-point operations per second.
        """
        passes = 0 if method == "magnitude" else 2
        operations = passes * 2.0 * self.weights * self.calibration + self._gathering(method)
        return (operations + self._solving(method) + self._judging()) / speed

    def training_seconds(self, tokens: int, speed: float) -> float:
        """A rough time of training: forwards and backwards, three times the operations of a forward pass."""
        return 3 * 2.0 * (self.weights + self.others) * tokens / speed

    def comparison_seconds(self, methods: Sequence[str], speed: float) -> float:
        """A rough time of two passes over the dense model, one for plans and one for all ``methods``, and of what each
        of these makes of it.
        """
        operations = 2 * 2.0 * self.weights * self.calibration + max(map(self._gathering, methods))
        return (operations + sum(self._solving(method) + self._judging() for method in methods)) / speed

    def _gathering(self, method: str) -> float:
        return 0.0 if method in ("magnitude", "wanda") else 2 * self.squares * self.calibration

    def _solving(self, method: str) -> float:
        return self.solves * {"magnitude": 0, "wanda": 0, "alps": 8}.get(method, 3)

    def _judging(self) -> float:
        return 2.0 * (self.weights + self.others) * self.held_out

    def export_seconds(self) -> float:
        """A rough time of one export with its checks: some passes over the weights on disk, and a start."""
        return 15 + 8 * 4 * (self.weights + self.others) / 2e8

    def bench_seconds(self, tokens: int, rounds: int, models: int, speed: float) -> float:
        """A rough time of a benchmark: loading, and decoding at the speed of memory."""
        a_token = 4 * (self.weights + self.others) / 8e9 + 2 * self.weights / speed / 4
        return models * (10 + rounds * tokens * a_token)


def measured_speed() -> float:
    """Floating-point operations per second of products of float32 matrices, on this machine, now."""
    one, two = torch.randn(1024, 1024), torch.randn(1024, 1024)
    one @ two
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        one @ two
        count += 1
    return count * 2 * 1024**3 / (time.perf_counter() - started)


def shown_time(seconds: float | None) -> str:
    """A rough time for people."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
