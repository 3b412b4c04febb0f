"""Small recovery jobs on random models."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparsedeploy.allocation.allocate import allocate
from sparsedeploy.calibration.samples import CalibrationSet
from sparsedeploy.plan import NM, MixedNM, parse_pattern
from sparsedeploy.pruning.layers import prune_model
from sparsedeploy.recovery.adapters import Adapter
from sparsedeploy.recovery.base import RecoveryJob
from sparsedeploy.recovery.data import TrainingData
from sparsedeploy.recovery.training import AdapterTraining, TrainingOptions, TrainingReport, train
from sparsedeploy.registry import ALLOCATORS, PRUNERS
from tests.small_models import random_model


def training_data(count: int = 40, length: int = 20, seed: int = 0) -> TrainingData:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(length // 2, length + 1, (count,), generator=generator).tolist()
    return TrainingData([torch.randint(0, 250, (n,), generator=generator) for n in lengths], "random", seed)


def job(
    model: nn.Module | None = None,
    *,
    sparsity: float | None = 0.6,
    pattern: str = "unstructured",
    pruner: str = "wanda",
    count: int = 40,
    training: TrainingOptions | None = None,
    **changes: Any,
) -> RecoveryJob:
    """A job on a random dense model (or the one given) with 4 calibration sequences of 16 tokens."""
    if model is None:
        model = random_model("llama", num_hidden_layers=4)
    model.requires_grad_(False)
    dense = copy.deepcopy(model)
    parsed: NM | MixedNM | None = parse_pattern(pattern)
    tokens = torch.randint(0, 250, (4, 16), generator=torch.Generator().manual_seed(3))
    return RecoveryJob(
        model=model,
        dense=lambda: dense,
        dense_model=lambda: dense,
        sparsity=parsed.sparsity if parsed else float(sparsity or 0),
        pattern=parsed,
        pruner=pruner,
        pruner_options=PRUNERS.get(pruner).make_options(),
        calibration=CalibrationSet(tokens, "random", 3),
        data=training_data(count),
        training=training or TrainingOptions(learning_rate=1e-2, batch_size=4, accumulation=1, clip=1.0),
        **changes,
    )


def pruned_job(**changes: Any) -> RecoveryJob:
    """A job whose model is pruned by its plan."""
    work = job(**changes)
    uniform = ALLOCATORS.get("uniform").make_options()
    tokens = work.calibration_tokens()
    work.plan = allocate(work.model, tokens, work.sparsity, work.pattern, "uniform", uniform)
    pruned = prune_model(work.model, tokens, work.plan, work.pruner, work.pruner_options)
    work.masks = {name: module.mask for name, module in pruned.items()}
    return work


def train_adapters(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    sequences: Sequence[torch.Tensor],
    options: TrainingOptions,
    **run: Any,
) -> TrainingReport:
    """Train adapters in place, outside a job."""
    return train(model, AdapterTraining(model, adapters), sequences, options, **run)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
