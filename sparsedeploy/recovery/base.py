"""What every recovery method is: a model and what was decided for it go in; masks, weights and a report come out.

Traits of a method: ``starts_from`` ("dense" or "pruned"), ``trains``, ``calibrates`` (reads its text), ``moves_masks``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparsedeploy.allocation.mixed import MixedOptions
from sparsedeploy.calibration.samples import CalibrationSet
from sparsedeploy.errors import UserError
from sparsedeploy.models.layers import LayerSource
from sparsedeploy.models.low_rank import LowRank
from sparsedeploy.models.structure import find_decoder_stack, plain_linears
from sparsedeploy.plan import NM, MixedNM, SparsityPlan
from sparsedeploy.processes import SINGLE_PROCESS, Processes
from sparsedeploy.recovery.data import TrainingData
from sparsedeploy.recovery.objective import Objective, make_objective
from sparsedeploy.recovery.options import Loss
from sparsedeploy.recovery.state import RunState
from sparsedeploy.recovery.training import Trainee, TrainingOptions, TrainingReport, train


@dataclass
class RecoveryJob:
    """What a method works on.

    Attributes:
        model: changed in place: the dense model, or the pruned one for methods that start from it. Its weights are
            those that are stored in the end.
        dense: the dense model's layers, for methods that compare with it.
        dense_model: loads the whole dense model, for an objective that reads its predictions.
        plan, masks: of the pruned model; None for methods that start from the dense one.
        sparsity, pattern: the target, for methods that prune by themselves.
        pruner, pruner_options: the pruning method that they use.
        allocation, allocation_options: what spreads sparsity over layers; None leaves it to the method.
        mixed: how mixed N:M patterns choose their N.
        calibration: text for statistics and reconstruction losses.
        accumulate: the type that statistics are summed in.
        data: text to train on.
        loss: what training minimises.
        state: what ``--resume`` continues from.
        processes: that share the training.
    """

    model: nn.Module
    dense: Callable[[], nn.Module | LayerSource]
    dense_model: Callable[[], nn.Module]
    sparsity: float
    pattern: NM | MixedNM | None
    pruner: str
    pruner_options: Any
    plan: SparsityPlan | None = None
    masks: dict[str, torch.Tensor] | None = None
    allocation: str | None = None
    allocation_options: Any = None
    mixed: MixedOptions = field(default_factory=MixedOptions)
    calibration: CalibrationSet | None = None
    batch_size: int | None = None
    accumulate: torch.dtype = torch.float32
    data: TrainingData | None = None
    loss: Loss = "ce"
    training: TrainingOptions = field(default_factory=TrainingOptions)
    seed: int = 0
    state: RunState | None = None
    model_sha256: str | None = None
    processes: Processes = SINGLE_PROCESS

    @property
    def linears(self) -> dict[str, nn.Linear]:
        return plain_linears(find_decoder_stack(self.model).all_linears(), "recovery")

    def training_data(self) -> TrainingData:
        """The training text.

        Raises:
            UserError: none was given.
        """
        if self.data is None:
            raise UserError("this recovery trains and no training text was given", "Add --train-data FILE.jsonl.")
        return self.data

    def objective(self) -> Objective:
        """What training minimises, ready to be called."""
        return make_objective(
            self.loss,
            self.training_data().sequences,
            self.dense_model,
            self.state,
            weight=self.training.kl_weight,
            temperature=self.training.kl_temperature,
            top=self.training.kl_top,
            processes=self.processes,
        )

    def train(
        self, trainee: Trainee, objective: Objective, tag: str, *, step: int = 0, which: range | None = None
    ) -> TrainingReport:
        """Train on the job's text; see :func:`~sparsedeploy.recovery.training.train`.

        Args:
            step: of several trainings of one job.
            which: of the text's sequences; None takes all.
        """
        sequences = self.training_data().sequences
        which = range(len(sequences)) if which is None else which
        return train(
            self.model,
            trainee,
            sequences[which.start : which.stop],
            self.training,
            seed=self.seed * 1009 + step,
            objective=objective,
            first=which.start,
            description=f"train ({tag})",
            state=self.state,
            processes=self.processes,
            tag=tag,
        )

    def calibration_tokens(self) -> torch.Tensor:
        """int64 ``[sequences, length]``.

        Raises:
            UserError: none was given.
        """
        if self.calibration is None:
            raise UserError("this recovery needs calibration text and none was given", "Add --data.")
        return self.calibration.tokens


@dataclass
class Recovered:
    """The result; the weights are in the job's model.

    Attributes:
        plan, masks: what is zero; masks are True where kept.
        losses: the pruner's, by module.
        report: plain data for the manifest.
        low_rank: factors that are kept beside the weights, by module.
    """

    plan: SparsityPlan
    masks: dict[str, torch.Tensor]
    losses: dict[str, float]
    report: dict[str, Any]
    low_rank: dict[str, LowRank] = field(default_factory=dict)


def check_masks(
    linears: dict[str, nn.Linear], masks: dict[str, torch.Tensor], plan: SparsityPlan | None = None
) -> None:
    """Refuse masks that are not these weights'.

    Args:
        plan: what the weights were pruned to; the masks must prune as many as it says.

    Raises:
        UserError: naming the module that lacks a mask, has another shape, has weights that its mask prunes, or another
            number of pruned weights than the plan.
    """
    fix = "Prune the model again, or give the folder that these masks came with."
    for name, linear in linears.items():
        if name not in masks:
            raise UserError(f"no mask for {name}", fix)
        mask = masks[name]
        if mask.shape != linear.weight.shape:
            raise UserError(f"the mask of {name} is {list(mask.shape)}, its weight {list(linear.weight.shape)}", fix)
        if bool((linear.weight.detach()[~mask.to(linear.weight.device)] != 0).any()):
            raise UserError(f"{name} has weights that its mask prunes", fix)
        target = plan.by_name.get(name) if plan else None
        if target is not None and int((~mask).sum()) != target.zeros:
            raise UserError(f"the mask of {name} prunes {int((~mask).sum())} weights, the plan {target.zeros}", fix)
