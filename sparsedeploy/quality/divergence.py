"""How far a changed model's predictions are from the dense model's: Kullback-Leibler divergence on fixed text.

Of the dense model the most likely tokens of each position are kept, and the rest as one; so the divergence is that
between these coarser distributions, never more than the full one, and needs no second model in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.errors import UserError

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
        logits = _logits(model, window)
        found = logits.topk(min(top, logits.shape[-1] - 1), dim=-1).indices
        tokens.append(found.to(torch.int32).cpu())
        logs.append(_coarse(logits, found).cpu())
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
    total, count = 0.0, 0
    for index in range(len(dense.windows)) if which is None else which:
        logits = _logits(model, dense.windows[index])
        logs = dense.logs[index].to(logits.device)
        other = _coarse(logits, dense.tokens[index].to(logits.device, torch.int64))
        total += float((logs.exp() * (logs - other)).sum(dtype=torch.float64)) / len(logs)
        count += 1
    return total / count


def _logits(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    """float32 ``[context - 1, vocabulary]``."""
    device = next(model.parameters()).device
    logits: torch.Tensor = model(input_ids=window[None].to(device), use_cache=False).logits
    return logits[0, :-1].float()


def _coarse(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of ``tokens [positions, top]`` and of all others together: ``[positions, top + 1]``."""
    total = logits.logsumexp(dim=-1, keepdim=True)
    logs = logits.gather(-1, tokens) - total
    # Never below float32's resolution: there a logarithm would tell rounding errors apart.
    rest = (1 - logs.double().exp().sum(dim=-1, keepdim=True)).clamp_min(1e-6).log().float()
    return torch.cat([logs, rest], dim=-1)
