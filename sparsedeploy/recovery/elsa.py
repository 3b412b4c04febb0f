"""ELSA: all pruned weights are trained on the language model's own loss, tied to a sparse copy of them by ADMM.

Lee et al., ICLR 2026, arXiv 2510.01650. With weights x, sparse copy z and scaled dual u:

- x: AdamW on the objective, then a step towards z - u (the proximal step of the penalty, stable whatever its size);
- every ``interval`` steps z = the projection of x + u on exactly as many weights as the plan keeps, in the norm that
  Adam's second moments give, and u = x + u - z;
- in the last steps the mask stays and the weights inside it are trained on, so that nothing is cut off at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.calibration.driver import iterate_weights
from sparsedeploy.errors import UserError
from sparsedeploy.masks import apply_mask, pack_bits, unpack_bits
from sparsedeploy.options import Options, option
from sparsedeploy.plan import ModuleTarget
from sparsedeploy.pruning.selection import keep_all_but_smallest, keep_by_target
from sparsedeploy.recovery.base import Recovered, RecoveryJob, check_masks
from sparsedeploy.recovery.low_rank_training import summary
from sparsedeploy.recovery.training import Trainee, steps_of
from sparsedeploy.registry import RECOVERIES

# What z and u are kept in: z rounded to float8 has one scale a row.
_STATES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float8": (torch.float8_e4m3fn, torch.bfloat16),
}
_FLOAT8_LARGEST = 448.0


@dataclass(frozen=True)
class ElsaOptions(Options):
    """Where the weights start, and how they are drawn to their sparse copy."""

    start: Literal["pruned", "dense"] = option(
        "pruned", "Begin at the pruned weights, or at the dense ones, as in the paper, with the pruned mask."
    )
    interval: int = option(8, "Optimizer steps from one projection to the next.", at_least=1)
    penalty: float = option(
        0.05, "Share of the distance to the sparse copy that each step goes, once risen.", above=0, at_most=1
    )
    ramp: Literal["cosine", "constant"] = option("cosine", "How the penalty rises to its value.")
    projection: Literal["objective", "magnitude"] = option(
        "objective", "Weigh weights by their gradients' second moments, or by nothing, when the smallest are dropped."
    )
    scope: Literal["matrix", "row"] = option(
        "matrix", "Weights compete within the whole matrix or within each output row."
    )
    settle: float = option(
        0.5, "Share of the steps, at the end, that train inside the mask as it then is.", at_least=0, at_most=1
    )
    states: Literal["float32", "bfloat16", "float8"] = option(
        "bfloat16", "What the sparse copy and the dual are kept in; `float8` keeps the dual in bfloat16."
    )


@RECOVERIES.register("elsa", ElsaOptions, starts_from="pruned", trains=True, calibrates=False, moves_masks=True)
def elsa(job: RecoveryJob, options: ElsaOptions) -> Recovered:
    """Train all pruned weights on the model's own loss while the mask moves by ADMM, at the exact budget (ELSA)."""
    masks, linears = job.masks or {}, job.linears
    assert job.plan is not None
    check_masks(linears, masks, job.plan)
    for name, linear in linears.items():
        if linear.weight.dtype != torch.float32:
            raise UserError(
                f"elsa trains the weights themselves, and {name} is {linear.weight.dtype}", "Add --dtype float32."
            )
    steps = steps_of(job.training_data().sequences, job.training)
    moving = steps - math.floor(options.settle * steps)
    if 0 < moving < options.interval:
        progress.note(f"the mask moves once: the text is enough for {moving} such steps, less than an interval")
    objective = job.objective()
    if options.start == "dense":
        _take_weights(job, linears)
    training = ElsaTraining(linears, masks, job.plan.by_name, options, moving)
    report = job.train(training, objective, "elsa")
    moved = sum(int((training.masks[name] & ~masks[name]).sum()) for name in linears)
    kept = sum(int(mask.sum()) for mask in masks.values())
    for linear in linears.values():
        linear.weight.requires_grad_(False)
    return Recovered(job.plan, training.masks, {}, {**summary(report), "mask_moved": moved / max(kept, 1)})


class ElsaTraining(Trainee):
    """The weights x in the model, their sparse copy z and the dual u beside it.

    Args:
        masks: of the first z, True where kept.
        moving: steps in which the mask moves; afterwards it stays.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        masks: Mapping[str, torch.Tensor],
        targets: Mapping[str, ModuleTarget],
        options: ElsaOptions,
        moving: int,
    ) -> None:
        self.weights = {name: cast(nn.Parameter, linear.weight) for name, linear in linears.items()}
        for weight in self.weights.values():
            weight.requires_grad_(True)
        self.masks = {name: masks[name].to(weight.device) for name, weight in self.weights.items()}
        self.targets = targets
        self.options = options
        self.moving = moving
        self.copies: dict[str, _Copy] = {}
        if moving:
            self.copies = {
                name: _Copy(apply_mask(weight.detach(), self.masks[name]), torch.zeros_like(weight), options.states)
                for name, weight in self.weights.items()
            }
        else:
            self._settle()

    def parameters(self) -> list[nn.Parameter]:
        return list(self.weights.values())

    @torch.no_grad()
    def stepped(self, optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
        if step >= self.moving:
            self._settle()
            return
        share = self.options.penalty
        if self.options.ramp == "cosine":
            share *= (1 - math.cos(math.pi * (step + 1) / self.moving)) / 2
        last = step + 1 == self.moving
        for name, weight in self.weights.items():
            copy = self.copies[name]
            dual = copy.dual()
            weight.lerp_(copy.sparse() - dual, share)
            if last or (step + 1) % self.options.interval == 0:
                wanted = weight + dual
                score = wanted.square()
                moments = optimizer.state[weight].get("exp_avg_sq")  # none yet of an expert that no token reached
                if self.options.projection == "objective" and moments is not None:
                    score *= moments + torch.finfo(torch.float32).tiny
                self.masks[name] = project(score, self.targets[name], self.options.scope)
                sparse = apply_mask(wanted, self.masks[name])
                copy.set(sparse, wanted - sparse)
        if last:
            self.copies = {}
            self._settle()

    @torch.no_grad()
    def _settle(self) -> None:
        for name, weight in self.weights.items():
            weight.copy_(apply_mask(weight, self.masks[name]))

    def tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for name, weight in self.weights.items():
            tensors[f"{name}.weight"], tensors[f"{name}.mask"] = weight.detach(), pack_bits(self.masks[name])
            if name in self.copies:
                tensors.update({f"{name}.{key}": value for key, value in self.copies[name].tensors().items()})
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(tensors[f"{name}.weight"])
            self.masks[name] = unpack_bits(tensors[f"{name}.mask"].to(weight.device), weight.shape[1])
            if f"{name}.z" in tensors:
                self.copies[name].load({key: tensors[f"{name}.{key}"].to(weight.device) for key in ("z", "scale", "u")})
        if not any(key.endswith(".z") for key in tensors):
            self.copies = {}


class _Copy:
    """z and u of one module, in the types of ``states``."""

    def __init__(self, sparse: torch.Tensor, dual: torch.Tensor, states: str) -> None:
        self._kinds = _STATES[states]
        self.set(sparse, dual)

    def set(self, sparse: torch.Tensor, dual: torch.Tensor) -> None:
        self._scale = sparse.new_ones(len(sparse), 1)
        if self._kinds[0] == torch.float8_e4m3fn:
            largest = sparse.abs().amax(dim=1, keepdim=True)
            self._scale = torch.where(largest > 0, largest / _FLOAT8_LARGEST, torch.ones_like(largest))
        self._z = (sparse / self._scale).to(self._kinds[0])
        self._u = dual.to(self._kinds[1])

    def sparse(self) -> torch.Tensor:
        return self._z.float() * self._scale

    def dual(self) -> torch.Tensor:
        return self._u.float()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"z": self._z, "scale": self._scale, "u": self._u}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._z, self._scale, self._u = tensors["z"], tensors["scale"], tensors["u"]


def project(scores: torch.Tensor, target: ModuleTarget, scope: str) -> torch.Tensor:
    """The mask of the highest scores, exactly as many as the target keeps, in its pattern if it has one."""
    if target.pattern is None and scope == "matrix":
        return keep_all_but_smallest(scores.reshape(1, -1), target.zeros).view_as(scores)
    return keep_by_target(scores, target)


@torch.no_grad()
def _take_weights(job: RecoveryJob, linears: Mapping[str, nn.Linear]) -> None:
    """Put the dense model's weights in place of the pruned ones.

    Raises:
        UserError: there is no other model than the pruned one.
    """
    dense = job.dense()
    if dense is job.model:
        raise UserError("start=dense needs the dense model", "Prune it in the same run: prune --recover elsa.")
    for layer in iterate_weights(dense):
        for name, linear in layer.linears.items():
            linears[name].weight.copy_(linear.weight)
