"""How far a pruned model's layers are from the dense model's, errors of earlier layers included."""

from __future__ import annotations

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.calibration.driver import LayerDriver
from sparsedeploy.models.layers import LayerSource


@torch.no_grad()
def reconstruction_losses(
    dense: nn.Module | LayerSource,
    pruned: nn.Module | LayerSource,
    tokens: torch.Tensor,
    *,
    batch_size: int | None = None,
) -> list[float]:
    """The relative error of each decoder layer's output; both models advance in lockstep, one buffer each.

    Args:
        tokens: int64 ``[sequences, length]``.

    Raises:
        UserError: weights that are not finite.
    """
    streams = (LayerDriver(model, tokens, batch_size=batch_size).hidden_states() for model in (dense, pruned))
    losses = []
    with progress.bar("reconstruction loss", None, "layers") as advance:
        for wanted, got in zip(*streams, strict=True):
            losses.append(relative_error(wanted, got))
            advance()
    return losses


def relative_error(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """Mean over features d of |Y_d - Yhat_d|^2 / |Y_d|^2, over all tokens of ``[sequences, ..., features]``.

    Summed in float64, sequence by sequence. A feature that is zero everywhere counts 0 when it is met, else 1.
    """
    error = torch.zeros(wanted.shape[-1], dtype=torch.float64, device=wanted.device)
    energy = torch.zeros_like(error)
    for y, other in zip(wanted, got, strict=True):
        exact = y.double()
        error += (exact - other.to(y.device).double()).square().flatten(0, -2).sum(dim=0)
        energy += exact.square().flatten(0, -2).sum(dim=0)
    share = torch.where(energy > 0, error / energy.clamp_min(torch.finfo(torch.float64).tiny), (error > 0).double())
    return share.mean().item()
