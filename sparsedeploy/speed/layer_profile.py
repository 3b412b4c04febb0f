"""Where the time goes: by decoder layer beside the layer's sparsity, and by kind of operator.

The times are the engine's own. Some engines' profiles are not steady enough to run twice in one process: each run has a
process of its own, and an operator's time is the least of the runs', for other work on the machine only adds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsedeploy.errors import UserError
from sparsedeploy.runtimes.engine import Deployment

RUNS = 3
_ATTEMPTS = 4
_LAYER = re.compile(r"(?:layers|layer|blocks|h)\.(\d+)\b")
OUTSIDE = "outside"


@dataclass(frozen=True)
class PartTime:
    """Time of a decoder layer, or of what lies outside them all.

    Attributes:
        part: the layer's number, or ``outside`` (embedding, last norm, output head).
        ms: of all its operators.
        linear_ms: of its products with weights.
        weights, zeros: of those weights.
        linears, sparse_kernels: how many products with weights, and how many of them the engine runs sparsely.
    """

    part: str
    ms: float
    linear_ms: float
    weights: int
    zeros: int
    linears: int
    sparse_kernels: int

    @property
    def sparsity(self) -> float | None:
        return self.zeros / self.weights if self.weights else None


@dataclass(frozen=True)
class KindTime:
    """Time of all operators of one kind, by the engine's own name for it."""

    kind: str
    ms: float
    count: int


@dataclass(frozen=True)
class Profile:
    """One candidate's time by part and by kind.

    Attributes:
        phase: ``prefill`` or ``decode``.
        what: what was run, in words.
        reason: why there is no profile; None when there is one.
        total_ms: of all operators.
        parts: the layers in order, then what is outside.
        kinds: the most expensive first.
    """

    name: str
    runtime: str
    phase: str
    what: str
    reason: str | None
    total_ms: float
    parts: list[PartTime]
    kinds: list[KindTime]


def profile_deployment(
    name: str,
    deployment: Deployment,
    phase: str,
    *,
    cores: int,
    prompt_length: int,
    new_tokens: int,
    chunk: int,
    seed: int,
    timeout: float = 600.0,
) -> Profile:
    """The engine's own profile of one candidate; one without ``reason`` has figures.

    Args:
        name: of the candidate.
        phase: ``prefill`` or ``decode``.
        seed: of the random tokens.
    """
    runtime = deployment.runtime
    if not runtime.profile:
        return Profile(name, runtime.name, phase, "", f"{runtime.title} has no profile", 0.0, [], [])
    found: list[dict[str, Any]] = []
    problem = ""
    for _ in range(_ATTEMPTS):
        try:
            with deployment.environment.worker(timeout) as worker:
                found.append(
                    worker.call(
                        "profile",
                        folder=str(deployment.folder.resolve()),
                        phase=phase,
                        cores=cores,
                        prompt_length=prompt_length,
                        new_tokens=new_tokens,
                        chunk=chunk,
                        seed=seed,
                    )
                )
        except UserError as error:
            problem = str(error)
        if len(found) == RUNS:
            break
    if not found:
        return Profile(name, runtime.name, phase, "", problem, 0.0, [], [])
    operators = least_of_runs([run["operators"] for run in found])
    return Profile(
        name=name,
        runtime=runtime.name,
        phase=phase,
        what=found[0]["what"],
        reason=None,
        total_ms=sum(one["ms"] for one in operators),
        parts=by_part(operators),
        kinds=by_kind(operators),
    )


def least_of_runs(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The operators with the least of their times over the runs, which list the same operators in the same order."""
    return [
        {**operators[0], "ms": min(operator["ms"] for operator in operators)} for operators in zip(*runs, strict=True)
    ]


def by_part(operators: Sequence[dict[str, Any]]) -> list[PartTime]:
    """Sum up operators by decoder layer.

    Args:
        operators: in the order of running; each with ``node`` (its name in the graph; empty for what the engine added
            itself, which counts to the part of the one before), ``ms``, ``weights``, ``zeros`` and ``sparse_kernel``.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    part = OUTSIDE
    for operator in operators:
        if operator["node"]:
            match = _LAYER.search(operator["node"])
            part = match[1] if match else OUTSIDE
        groups.setdefault(part, []).append(operator)
    order = sorted(groups, key=lambda name: (name == OUTSIDE, int(name) if name != OUTSIDE else 0))
    return [_part(name, groups[name]) for name in order]


def by_kind(operators: Sequence[dict[str, Any]]) -> list[KindTime]:
    """Sum up operators by kind."""
    groups: dict[str, list[float]] = {}
    for operator in operators:
        groups.setdefault(operator["kind"], []).append(operator["ms"])
    kinds = [KindTime(kind, sum(times), len(times)) for kind, times in groups.items()]
    return sorted(kinds, key=lambda kind: -kind.ms)


def _part(name: str, operators: Sequence[dict[str, Any]]) -> PartTime:
    linears = [operator for operator in operators if operator["weights"]]
    return PartTime(
        part=name,
        ms=sum(operator["ms"] for operator in operators),
        linear_ms=sum(operator["ms"] for operator in linears),
        weights=sum(operator["weights"] for operator in linears),
        zeros=sum(operator["zeros"] for operator in linears),
        linears=len(linears),
        sparse_kernels=sum(bool(operator["sparse_kernel"]) for operator in linears),
    )
