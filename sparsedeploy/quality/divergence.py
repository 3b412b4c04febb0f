"""How far a changed model's predictions are from the dense model's: Kullback-Leibler divergence on fixed text.

Of the dense model the most likely tokens of each position are kept, and the rest as one; so the divergence is that
between these coarser distributions, never more than the full one, and needs no second model in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.models.predictions import coarse_logs, coarse_predictions, next_token_logits

TOP = 256


@dataclass(frozen=True)
class DensePredictions:
    """The dense model's predictions on ``windows [count, context]``.

    Attributes:
        tokens: its most likely next tokens, int32 ``[count, context - 1, top]``.
        logs: their log-probabilities, float32, and that of all others together at the end: ``top + 1``.
    """

    windows: torch.Tensor
    tokens: torch.Tensor
    logs: torch.Tensor


@torch.no_grad()
def dense_predictions(model: nn.Module, windows: torch.Tensor, *, top: int = TOP) -> DensePredictions:
    """Predict every window once.

    Raises:
        UserError: predictions that are not finite.
    """
    tokens, logs = [], []
    for window in progress.track(windows, "dense predictions", len(windows), "windows"):
        found, its_logs = coarse_predictions(next_token_logits(model, window[None])[0], top)
        tokens.append(found.cpu())
        logs.append(its_logs.cpu())
    result = DensePredictions(windows, torch.stack(tokens), torch.stack(logs))
    if not bool(torch.isfinite(result.logs).all()):
        raise UserError("the dense model's predictions are not finite", "Check the checkpoint, or use --dtype float32.")
    return result


@torch.no_grad()
def divergence(model: nn.Module, dense: DensePredictions, which: Iterable[int] | None = None) -> float:
    """Mean over all positions of KL(dense || model) in nats; NaN or infinite where the model has diverged.

    Args:
        which: the windows to measure on; None takes all.
    """
    chosen = range(len(dense.windows)) if which is None else list(which)
    return sum(float(_of_window(model, dense, index)) for index in chosen) / len(chosen)


def divergence_gradients(
    model: nn.Module, dense: DensePredictions, weights: Mapping[str, torch.Tensor], which: Sequence[int]
) -> dict[str, torch.Tensor]:
    """The gradient of :func:`divergence` by each of the model's ``weights``; one of each in memory."""
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for index in which:
            (_of_window(model, dense, index) / len(which)).backward()
        return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None


def _of_window(model: nn.Module, dense: DensePredictions, index: int) -> torch.Tensor:
    logits = next_token_logits(model, dense.windows[index][None])[0]
    logs = dense.logs[index].to(logits.device)
    other = coarse_logs(logits, dense.tokens[index].to(logits.device, torch.int64))
    return (logs.exp() * (logs - other)).sum(dtype=torch.float64) / len(logs)
