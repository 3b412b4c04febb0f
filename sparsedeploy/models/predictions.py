"""A model's predictions in few numbers: its most likely tokens at each position, and all others as one."""

from __future__ import annotations

import torch
from torch import nn


def coarse_logs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of ``tokens [..., top]`` and of all other tokens together: ``[..., top + 1]``.

    Args:
        logits: float ``[..., vocabulary]``; gradients flow to them.
    """
    total = logits.logsumexp(dim=-1, keepdim=True)
    logs = logits.gather(-1, tokens) - total
    # Never below float32's resolution: there a logarithm would tell rounding errors apart.
    rest = (1 - logs.double().exp().sum(dim=-1, keepdim=True)).clamp_min(1e-6).log().float()
    return torch.cat([logs, rest], dim=-1)


def coarse_predictions(logits: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``top`` most likely tokens, int32 ``[..., top]``, and their :func:`coarse_logs`."""
    tokens = logits.topk(min(top, logits.shape[-1] - 1), dim=-1).indices
    return tokens.to(torch.int32), coarse_logs(logits, tokens)


def next_token_logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """What follows each token of ``[sequences, length]`` but the last: ``[sequences, length - 1, vocabulary]``."""
    device = next(model.parameters()).device
    logits: torch.Tensor = model(input_ids=tokens.to(device), use_cache=False).logits
    return logits[:, :-1].float()
